"""Documents and their manifest, from the standard library's own source text or from files."""

import codecs
import dataclasses
import hashlib
import importlib
import io
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

PYTHON_STDLIB = "python_stdlib"
FILES_PREFIX = "hf:"
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (".jsonl", ".parquet", *TEXT_SUFFIXES)
# Bytes of files that one text source may have: prepared in memory, they take some eight times as
# much (strings, their word sequences, ids), so that a host of 16 GB manages. More is for shards.
MOST_TEXT_BYTES = 2_000_000_000
TEXT_COLUMN = "text"  # the field of a .jsonl row and the column of a .parquet table

# Tests repeat the library's code; encodings, pydoc_data and lib2to3 are tables, idlelib is an
# application; the last three hold no source of the standard library.
EXCLUDED_FOLDERS = frozenset(
    ["test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"]
    + ["site-packages", "dist-packages", "__pycache__"]
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text; `name` is its path below the source, with `:row` where a file holds several."""

    text: str
    name: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of one file that was read."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Collection:
    """Everything read from one source, in the order of the sorted file names."""

    source: str
    documents: tuple[Document, ...]
    files: tuple[FileRecord, ...]
    skipped: tuple[str, ...] = ()  # standard-library files that are not UTF-8
    left_out: tuple[str, ...] = ()  # files of a folder whose ending is none that is read


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files that a run's corpus was made from.

    `fingerprint()` is the SHA-256 of the files' names and contents, source by source, and of the
    held-out fraction. Where the files lie does not enter it: moved data is the same data.
    """

    sources: tuple[str, ...]
    files: tuple[tuple[FileRecord, ...], ...]  # one tuple for each source
    held_out_fraction: float

    def fingerprint(self) -> str:
        """SHA-256 of what decides which text is read: the files and the held-out fraction, not the
        names of the sources."""
        body = [[dataclasses.astuple(record) for record in files] for files in self.files]
        text = json.dumps([self.held_out_fraction, body], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, as lists and dicts."""
        return {
            "sources": list(self.sources),
            "held_out_fraction": self.held_out_fraction,
            "files": [[dataclasses.asdict(record) for record in files] for files in self.files],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Manifest":
        """The manifest that gave these values. Raises KeyError or TypeError for others."""
        files = tuple(tuple(FileRecord(**record) for record in files) for files in value["files"])
        return cls(tuple(value["sources"]), files, value["held_out_fraction"])

    def differences(self, other: "Manifest") -> list[str]:
        """One line for each way in which `other` is not this manifest; empty for the same data."""
        if len(self.files) != len(other.files):
            return [f"{len(self.files)} sources became {len(other.files)}"]
        lines = []
        if self.held_out_fraction != other.held_out_fraction:
            lines.append(
                f"held_out_fraction {self.held_out_fraction} became {other.held_out_fraction}"
            )
        for source, before, after in zip(self.sources, self.files, other.files, strict=True):
            old, new = ({record.name: record for record in files} for files in (before, after))
            lines += [f"{source}: {name} is gone" for name in old if name not in new]
            lines += [f"{source}: {name} is new" for name in new if name not in old]
            lines += [
                f"{source}: {name} has other contents"
                for name in old
                if name in new and old[name] != new[name]
            ]
        return lines


class WithFiles(Protocol):
    """A source that was opened: a Collection, or token shards."""

    source: str
    files: tuple[FileRecord, ...]


def manifest_of(collections: Iterable[WithFiles], held_out_fraction: float) -> Manifest:
    """The manifest of the collections, to be stored with the run."""
    collections = tuple(collections)
    sources = tuple(collection.source for collection in collections)
    return Manifest(sources, tuple(c.files for c in collections), held_out_fraction)


def collect(source: str) -> Collection:
    """Every document of a source: `python_stdlib`, or `hf:PATH` naming a file or a folder.

    PATH is a .jsonl (one object a row, field "text"), a .parquet (column "text"; needs pyarrow),
    a .txt, .md or .py, or a folder of those, searched to any depth without hidden folders; its
    other files are named in `left_out`. Files come sorted by path. Blank documents are left out.
    The text stays in memory.

    Raises ValueError naming the source, the file and the row when the source is unknown or
    missing, holds no document, or has a row that cannot be read. Only in `python_stdlib` is a file
    that is not UTF-8 skipped, and named in `skipped`.
    """
    found = files_of(source)
    if (size := sum(path.stat().st_size for path in found.paths)) > MOST_TEXT_BYTES:
        raise ValueError(
            f"data source {source!r} has {size:,} bytes of files, and text is prepared in memory "
            f"up to {MOST_TEXT_BYTES:,}; make token shards of it once with python -m "
            "nemotron_jax.data.tokenize, and name shards:DIR instead"
        )
    documents: list[Document] = []
    files: list[FileRecord] = []
    skipped: list[str] = []
    for name, path in found.named():
        with opened(source, name, path) as file:
            content = file.read()
        try:
            documents += documents_in(source, name, io.BytesIO(content))
        except UnicodeDecodeError as error:
            check_skipped(source, name, error)
            skipped.append(name)
            continue
        files.append(FileRecord(name, len(content), hashlib.sha256(content).hexdigest()))
    if not documents:
        raise no_text(found)
    return Collection(source, tuple(documents), tuple(files), tuple(skipped), found.left_out)


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The files of a source, sorted by path."""

    source: str
    root: Path
    paths: tuple[Path, ...]
    left_out: tuple[str, ...] = ()  # files of a folder whose ending is none that is read

    def named(self) -> Iterator[tuple[str, Path]]:
        """Each file with its name below the root."""
        for path in self.paths:
            yield path.relative_to(self.root).as_posix(), path


def files_of(source: str) -> SourceFiles:
    """The files of a text source; raises ValueError where it is unknown or missing."""
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return SourceFiles(source, root, tuple(_library_files(root)))
    if not source.startswith(FILES_PREFIX):
        raise ValueError(
            f"data source {source!r} is unknown: name {PYTHON_STDLIB!r}, or {FILES_PREFIX}PATH "
            f"of a {', '.join(SUFFIXES)} file or a folder of them, or for pre-training shards:DIR"
        )
    if source == FILES_PREFIX:
        raise ValueError(f"data source {source!r} names no file or folder; as in hf:texts")
    given = Path(source.removeprefix(FILES_PREFIX)).expanduser()
    paths, left_out = _user_files(source, given)
    root = given if given.is_dir() else given.parent
    return SourceFiles(source, root, tuple(paths), tuple(left_out))


def opened(source: str, name: str, path: Path) -> BinaryIO:
    """A source's file, to be read; raises ValueError where it cannot be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"data source {source!r}: {name} cannot be read ({error})") from None


def check_skipped(source: str, name: str, error: UnicodeDecodeError) -> None:
    """Raise ValueError for a file that is not UTF-8, but for one of the standard library."""
    if source != PYTHON_STDLIB:
        raise ValueError(
            f"data source {source!r}: {name} is not UTF-8 at byte {error.start}; "
            "convert the file or leave it out of the folder"
        ) from None


def no_text(found: SourceFiles) -> ValueError:
    """The error of a source without a document."""
    left_out = found.left_out
    unread = f"; {left_out[0]} is of a kind that is not read: convert it" if left_out else ""
    return ValueError(
        f"data source {found.source!r} holds no text: read {len(found.paths)} files below "
        f"{found.root}; name a {', '.join(SUFFIXES)} file with text, or a folder of them{unread}"
    )


def _library_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if path.is_file() and not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _user_files(source: str, given: Path) -> tuple[list[Path], list[str]]:
    """The files to read, and the names of a folder's others."""
    if given.is_dir():
        inside = [
            path
            for path in sorted(given.rglob("*"))
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(given).parts)
        ]
        read = [path for path in inside if path.suffix.lower() in SUFFIXES]
        others = [path for path in inside if path.suffix.lower() not in SUFFIXES]
        return read, [path.relative_to(given).as_posix() for path in others]
    if not given.is_file():
        raise ValueError(f"data source {source!r}: there is no file or folder {given}")
    if given.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"data source {source!r}: {given.name} has none of the endings {', '.join(SUFFIXES)}; "
            "rename it or convert it"
        )
    return [given], []


def documents_in(source: str, name: str, file: BinaryIO) -> Iterator[Document]:
    """The documents of one file, blank ones left out; of a table one row is read at a time.

    Raises ValueError naming the row that cannot be read, UnicodeDecodeError where it is not UTF-8.
    """
    return (document for document in _documents(source, name, file) if document.text.strip())


def _documents(source: str, name: str, file: BinaryIO) -> Iterator[Document]:
    if name.lower().endswith(".jsonl"):
        rows: Iterable[tuple[int, Any]] = _json_rows(source, name, file)
    elif name.lower().endswith(".parquet"):
        rows = _parquet_rows(source, name, file)
    else:
        yield Document(file.read().removeprefix(codecs.BOM_UTF8).decode("utf-8"), name)
        return
    for number, text in rows:
        place = f"data source {source!r}: {name} row {number}"
        if isinstance(text, Mapping):
            fields = ", ".join(map(repr, list(text)[:8])) or "none"
            raise ValueError(
                f"{place} has no field {TEXT_COLUMN!r}; its fields are {fields}: every row needs a "
                f"string named {TEXT_COLUMN!r}; rename the field that holds the text"
            )
        if not isinstance(text, str):
            raise ValueError(
                f"{place} has {type(text).__name__} in field {TEXT_COLUMN!r}: every row needs a "
                f"string there; repair or remove the row"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{place} holds half of a surrogate pair, which is no character; "
                "repair or remove the row"
            )
        yield Document(text, f"{name}:{number}")


def _json_rows(source: str, name: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    # lines of bytes: str.splitlines would also cut at U+2028, which JSON strings may hold unescaped
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # integers of too many digits, deep nesting
            reason = getattr(error, "msg", error)
            raise ValueError(
                f"data source {source!r}: {name} row {number} is not JSON ({reason}); "
                "repair or remove the row"
            ) from None
        is_whole = not isinstance(row, dict) or TEXT_COLUMN not in row
        yield number, row if is_whole else row[TEXT_COLUMN]


def _parquet_rows(source: str, name: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    parquet = _import_parquet(source, name)
    try:
        table = parquet.ParquetFile(file)
        if TEXT_COLUMN not in table.schema_arrow.names:
            raise ValueError(f"it has columns {table.schema_arrow.names}, none named 'text'")
        number = 0
        for batch in table.iter_batches(columns=[TEXT_COLUMN]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, text
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two kinds
        raise ValueError(
            f"data source {source!r}: {name} cannot be read as parquet: {error}"
        ) from error


def _import_parquet(source: str, name: str) -> ModuleType:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"data source {source!r}: reading {name} needs pyarrow; install it "
            "(pip install -e '.[parquet]' in a checkout) or convert the file to .jsonl"
        ) from None
