"""result.json of a run, read back whatever has happened to it."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import RunDirectory


def read_result(path: Path) -> dict[str, Any] | None:
    """The result of reinforcement learning in a file; None where there is none, or, with a warning,
    where it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and _is_whole(found):
        return found
    warnings.warn(f"{path}: is damaged and left out; it is made again", stacklevel=2)
    return None


def read_values(path: Path) -> dict[str, Any]:
    """The object of a file; empty where there is none, or no whole one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_values(directory: RunDirectory, values: Mapping[str, Any]) -> None:
    """Write the result of a run into its directory, by the process that writes there."""
    if directory.writer:
        with atomic_writer(directory.result) as out:
            out.write((json.dumps(values, indent=1) + "\n").encode())


def _is_whole(found: dict[str, Any]) -> bool:
    environments = found.get("environments")
    parts = environments.values() if isinstance(environments, dict) else [None]
    easy = not any(name.startswith("easy_") for name in found) or all(
        _is_number(found.get(f"easy_{name}")) for name in ("before", "after")
    )
    return easy and all(map(_is_part, (found, *parts)))


def _is_part(part: Any) -> bool:
    """Whether it has means, an interval and a number of tasks."""
    if not isinstance(part, dict) or not isinstance(part.get("interval"), list):
        return False
    numbers = [part.get("before"), part.get("after"), part.get("n"), *part["interval"]]
    return len(part["interval"]) == 2 and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)
