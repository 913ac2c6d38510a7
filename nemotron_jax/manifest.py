"""A folder's manifest: size and SHA-256 of every file in it, written last, checked on reading."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from nemotron_jax.files import atomic_writer

FILE_NAME = "manifest.json"
_READERS = 8  # hashing leaves the interpreter lock, so that threads share the work


def write_manifest(folder: Path) -> None:
    """Seal a folder: every file is on disk before its manifest is, and that before this returns."""
    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        sums = list(pool.map(_sealed_sum, files))
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sum_}
        for file, sum_ in zip(files, sums, strict=True)
    }
    for directory in {file.parent for file in files}:
        sync_directory(directory)
    with atomic_writer(folder / FILE_NAME) as out:
        out.write(json.dumps({"files": entries}, indent=1).encode())
    sync_directory(folder)


def find_fault(folder: Path, parts: Iterable[str] = ("",)) -> str | None:
    """One sentence on the first missing, cut short or changed file; None when all are whole.

    `parts` are the beginnings of the names that are checked, such as `arrays/model/`.
    """
    manifest = folder / FILE_NAME
    try:
        entries = json.loads(manifest.read_text("utf-8"))["files"]
        wanted = {
            folder / name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in entries.items()
            if name.startswith(tuple(parts))
        }
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error!r})"
    except (RecursionError, OverflowError) as error:  # too deep, a size of 1e999
        return f"{manifest} cannot be read ({error!r})"
    if not wanted:
        return f"{manifest} names no files"
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        faults = pool.map(_file_fault, wanted, *zip(*wanted.values(), strict=True))
        return next(filter(None, faults), None)


def sync_directory(folder: Path) -> None:
    """A rename or a new name in a folder survives a power cut only once the folder is synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE_NAME)


def _sealed_sum(file: Path) -> str:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _file_fault(file: Path, size: int, sum_: str) -> str | None:
    try:
        found = file.stat().st_size
        if found != size:
            return f"{file} has {found} bytes instead of {size}"
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != sum_:
                return f"{file} was changed: its SHA-256 is not the one in {FILE_NAME}"
    except FileNotFoundError:
        return f"{file} is missing"
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        return f"{ascii(str(file))} cannot be read ({error})"
    return None
