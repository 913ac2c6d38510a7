"""Files of directories that others made, read within bounds: an error names the file in one
line."""

import json
import reprlib
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # of a JSON file; the index of the family's largest checkpoint takes 4 MiB
MOST_NESTED = 50  # levels of lists and objects; real files have four

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 300
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


def shown(value: object) -> str:
    """A value as an error quotes it: its repr, one line and cut where it is long or deep."""
    text = _SHORT.repr(value)
    return text if len(text) <= 400 else text[:400] + "…"


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content. Raises OSError where there is no such file, ValueError where it is none or
    is longer than `most` bytes."""
    if path.exists() and not path.is_file():  # a pipe would wait, a device would never end
        raise ValueError("it is not a file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most} bytes")
    return content


def parse_json(text: bytes) -> Any:
    """What JSON text says. Raises ValueError where it is none, or nested beyond MOST_NESTED."""
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_NESTED} levels") from None
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MOST_NESTED} levels")


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """The object that a JSON file holds; `hint` says what to do where there is none.

    Raises ValueError, naming the file, for any other content.
    """
    try:
        value = parse_json(read_bytes(path))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {shown(value)} and no JSON object")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {hint}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {hint}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({str(error)[:200]}); {hint}") from None
    return value
