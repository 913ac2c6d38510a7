"""What a run writes down: metrics.jsonl and samples.txt, each step once; speed and utilisation."""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from nemotron_jax.data.json_lines import keep_damaged, read_objects
from nemotron_jax.files import atomic_writer
from pallas_kernels import devices

Record = dict[str, Any]

_SAMPLE_HEAD = re.compile(r"step (\d{1,18})")


class MetricsLog:
    """metrics.jsonl: one JSON object for each logged step, in order.

    Opened at a step it drops what a killed run wrote after that step, and a half-written last line.
    A line that is damaged otherwise is left out with a warning; the file as it was stays beside it.
    Numbers that are not finite are written as null. One that is not the `writer` only knows the
    records.
    """

    def __init__(self, path: Path, step: int, *, writer: bool = True) -> None:
        self.path, self._writer = path, writer
        records, damaged = read_records(path)
        if damaged and writer:
            keep_damaged(path, damaged)
        self.records = [record for record in records if record["step"] <= step]
        self._file = self._opened_anew()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one step's record; it is with the operating system when this returns."""
        self.records.append(_jsonable(record))
        if self._file is not None:
            self._file.write(_line(self.records[-1]))
            self._file.flush()

    def extend_last(self, values: Mapping[str, Any]) -> None:
        """Add values to the last record; the file is replaced as a whole."""
        self.records[-1] |= _jsonable(values)
        self.close()
        self._file = self._opened_anew()

    def sync(self) -> None:
        """On disk: a checkpoint must not outlive the records of the steps before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, if this process writes it."""
        if self._file is not None:
            self._file.close()

    def _opened_anew(self) -> TextIO | None:
        """The file, written whole and open for more; None where another process writes it."""
        if not self._writer:
            return None
        with atomic_writer(self.path) as out:
            out.write("".join(map(_line, self.records)).encode())
        return self.path.open("a", encoding="utf-8")


class SamplesLog:
    """samples.txt: blocks of text below a line `step N`, each step once, indented by two blanks."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        kept = []
        for line in text.removesuffix("\n").split("\n") if text else ():
            head = _SAMPLE_HEAD.fullmatch(line)
            if head and int(head[1]) > step:
                break
            kept.append(f"{line}\n")
        with atomic_writer(path) as out:
            out.write("".join(kept).encode())

    def append(self, step: int, text: str) -> None:
        """Add the text of a step, every line of it indented."""
        # Only "\n" ends a line here, so that no sample can hold a line that looks like a heading.
        lines = "".join(f"  {line}\n" for line in text.replace("\r", "").split("\n"))
        with self.path.open("a", encoding="utf-8", newline="\n") as out:
            out.write(f"step {step}\n{lines}")


class Speed:
    """Tokens per second and utilisation of the steps since the last reading.

    What is not training (compiling, evaluating, sampling) is taken out by `pause` and `resume`.
    """

    def __init__(
        self, tokens_per_step: int, flops_per_token: float, step: int, seconds: float = 0.0
    ) -> None:
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._peak = peak_flops()
        self._seconds = seconds  # of training since the run began
        self._read_step, self._read_seconds = step, seconds
        self._since: float | None = None

    def resume(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock; without effect when it stands still."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def restart(self, step: int) -> None:
        """Leave the steps up to `step` out of the next reading."""
        self.pause()
        self._read_step, self._read_seconds = step, self._seconds
        self.resume()

    def read(self, step: int) -> Record:
        """`tokens_per_second`, `mfu` and `seconds` at a step; the first two null without a step."""
        self.pause()
        steps, seconds = step - self._read_step, self._seconds - self._read_seconds
        self._read_step, self._read_seconds = step, self._seconds
        self.resume()
        rate = steps * self._tokens / seconds if steps > 0 and seconds > 0 else None
        known = rate is not None and self._peak is not None
        return {
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak if known else None,
            "seconds": self._seconds,
        }


def peak_flops() -> float | None:
    """Dense bfloat16 FLOP/s of all devices together; None where the kind's peak is not known."""
    here = jax.devices()
    known = devices.of_kind(here[0].device_kind)
    return None if known is None else known.flops * len(here)


def read_records(path: Path) -> tuple[list[Record], list[int]]:
    """The records of a metrics.jsonl, steps ascending, and the numbers of its damaged lines."""
    records: list[Record] = []
    damaged: list[int] = []
    for number, record in read_objects(path):
        if _is_record(record) and (not records or record["step"] > records[-1]["step"]):
            records.append(_jsonable(record))
        else:
            damaged.append(number)
    return records, damaged


def _is_record(record: dict[str, Any] | None) -> bool:
    """Whether a line holds what `append` writes: a step, and plain values by name."""
    plain = record is not None and all(
        value is None or isinstance(value, str | int | float) for value in record.values()
    )
    return plain and type(record.get("step")) is int


def _jsonable(values: Mapping[str, Any]) -> Record:
    """Plain numbers under their names; float32 as the shortest decimal of that float32's value."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int):
            return value
        value = float(value)
        return value if math.isfinite(value) else None

    return {name: plain(value) for name, value in values.items()}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
