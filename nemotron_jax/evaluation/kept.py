"""Results as JSON, each kept in a file of its own as soon as its suite ends."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_jax.evaluation.suite import Result, Value
from nemotron_jax.files import atomic_writer

FORMAT, FORMAT_VERSION = "nemotron_jax.suite", 1
Record = dict[str, Any]


def record_of(result: Result, twin: Result | None = None) -> Record:
    """What a suite found as JSON values; each value's `untrained` is the mean that the twin has."""
    untrained = {} if twin is None else {name: v.mean for name, v in twin.values.items()}
    return finite(
        {
            "values": {
                name: _value(value, untrained.get(name)) for name, value in result.values.items()
            },
            "counts": dataclasses.asdict(result.counts),
            "tables": [dataclasses.asdict(table) for table in result.tables],
            "tables_per_second": [dataclasses.asdict(table) for table in result.timed],
            "plots": [dataclasses.asdict(plot) for plot in result.plots],
            "headline": list(result.headline),
            "says": list(result.says),
        }
    )


def _value(value: Value, untrained: float | None) -> Record:
    record = dataclasses.asdict(value)
    if value.untrained is None:
        record["untrained"] = untrained
    return record


def digest(values: Mapping[str, Any]) -> str:
    """A short name of JSON values."""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_of(directory: Path, suite: str, key: Mapping[str, Any]) -> Path:
    """Where the result of a suite that was asked so is kept."""
    return directory / "suites" / f"{suite}-{digest(key)}.json"


def keep(path: Path, key: Mapping[str, Any], record: Record) -> None:
    """Write a result down, whole."""
    kept = {"format": FORMAT, "format_version": FORMAT_VERSION, "key": dict(key), **record}
    write_json(path, kept)


def read(path: Path) -> Record | None:
    """A result that was kept; None where there is none, or one that cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ok = isinstance(found, dict) and found.get("format") == FORMAT
    return found if ok and found.get("format_version") == FORMAT_VERSION else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Strict JSON, whole or absent; numbers that are not finite become null."""
    text = json.dumps(finite(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or absent."""
    with atomic_writer(path) as out:
        out.write(text.encode())


def finite(value: Any) -> Any:
    """JSON values with lists for tuples and null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if hasattr(value, "item"):  # numpy's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
