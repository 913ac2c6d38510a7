"""Files of JSON lines that a run has written, read back whatever has happened to them."""

import itertools
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and object of each line of a file; None for a damaged one, which holds none.

    Only a line feed ends a line: JSON leaves U+2028, U+0085 and their kin as they are, and a text
    may hold them. A last line without its end was cut off by a kill; it is left out, unless it is
    an object all the same. No file has no lines.
    """
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")
    yield from ((number, _object(line)) for number, line in enumerate(lines, start=1))
    if (found := _object(last)) is not None:
        yield len(lines) + 1, found


def keep_damaged(path: Path, lines: Sequence[int]) -> None:
    """Copy a file beside itself as it is, before its damaged lines are left out, and warn."""
    copy = _free_name(path)
    shutil.copyfile(path, copy)
    warnings.warn(
        f"{path}: lines {', '.join(map(str, lines[:5]))} are damaged and left out; the file as it "
        f"was is kept in {copy}",
        stacklevel=3,
    )


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _free_name(path: Path) -> Path:
    """The first of NAME.damaged, NAME.damaged.1, … that no file has."""
    names = (path.with_name(f"{path.name}.damaged{n and f'.{n}' or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())
