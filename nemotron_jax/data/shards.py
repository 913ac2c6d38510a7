"""Token shards: documents as ids in files, made once by tokenize.py, read a record at a time.

    DIR/  tokenizer.json  index.json
          shards/000000-00000.arrayrecord …  shards/held_out.arrayrecord

A shard's records are pieces of documents of at most PIECE_TOKENS ids, each document closed by eos;
its last record holds the documents' lengths. The index comes last: a DIR without one is unfinished.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from nemotron_jax.config.untrusted import read_bytes, shown
from nemotron_jax.data import order
from nemotron_jax.data.sources import Document, FileRecord
from nemotron_jax.data.tokenizer import Tokenizer

SHARDS_PREFIX = "shards:"
INDEX, FOLDER, HELD_OUT, ENDING = "index.json", "shards", "held_out", ".arrayrecord"
FORMAT, FORMAT_VERSION = "nemotron_jax.token_shards", 1
# Ids of one record: what reading a few tokens of a long document costs, 64 KB.
PIECE_TOKENS = 1 << 14
LENGTH = np.dtype("<u4")  # of a shard's last record
# Shards of a source whose table of records stays in memory, 53 bytes a record as measured: 340 MB
# with documents of 1,000 ids in shards of 10^8. A window draws from 64 runs of documents; a shard
# that is opened again costs 10 ms.
OPEN_SHARDS = 64
# Bytes of shards up to which all are read and their SHA-256 compared before a run starts, about a
# second. Larger ones are compared in size, and each record by its own checksum when it is read.
MOST_HASHED_BYTES = 1 << 30
MOST_INDEX_BYTES = 1 << 30  # 20 T tokens have some 50 MB
_RECORD_BITS = 40  # a place is shard << 40 | record
_READ_OPTIONS = "readahead_buffer_size:0"  # rows are anywhere: nothing is read ahead


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of the index."""

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Index:
    """What index.json says of token shards. `fingerprint` is that of documents and tokenizer, the
    same for any size of shards."""

    fingerprint: str
    settings: dict[str, Any]  # what they were made from, to be made again
    tokenizer: str  # its fingerprint
    held_out_fraction: float
    dtype: str
    unit_documents: int
    unit_tokens: list[int]
    token_counts: list[int]  # how often each id occurs
    shards: list[Shard]
    held_out: Shard
    dropped: list[str]  # held-out documents that repeat training text

    def to_json(self) -> bytes:
        """The bytes of the index' file: JSON with its format and a checksum of everything in it."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(body | {"checksum": _checksum(body)}, separators=(",", ":")).encode()

    @classmethod
    def read(cls, file: Path) -> "Index":
        """The index of a file; raises ValueError in one line where it is not whole."""
        try:
            body = json.loads(read_bytes(file, MOST_INDEX_BYTES))
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if (version := body.get("format_version")) != FORMAT_VERSION:
                raise ValueError(f"it has format_version={shown(version)}, not {FORMAT_VERSION}")
            if body.pop("checksum", None) != _checksum(body):
                raise ValueError("its checksum is another: it was changed or cut short")
            fields = {field.name: body[field.name] for field in dataclasses.fields(cls)}
            shards = [Shard(**one) for one in body["shards"]]
            index = cls(**fields | {"shards": shards, "held_out": Shard(**body["held_out"])})
            if index.unit_documents != order.UNIT_DOCUMENTS:
                raise ValueError(
                    f"unit_documents={index.unit_documents}, not {order.UNIT_DOCUMENTS}"
                )
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{file} cannot be used ({str(error)[:200]}); restore it, or make the shards anew "
                "with python -m nemotron_jax.data.tokenize"
            ) from None
        return index


class TokenShards:
    """Finished token shards of a directory, checked on opening; the training documents of them.

    In memory: the index, 8 bytes for each 2^14 documents, and the tables of OPEN_SHARDS shards.
    Raises ValueError naming the first file that is missing, damaged or of another tokenizer.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.directory = Path(source.removeprefix(SHARDS_PREFIX)).expanduser()
        if source == SHARDS_PREFIX:
            raise ValueError(f"data source {source!r} names no directory; as in shards:tokens")
        file = self.directory / INDEX
        if not file.is_file():
            raise ValueError(
                f"data source {source!r}: {file} is missing; the shards are made, or their making "
                f"goes on, with python -m nemotron_jax.data.tokenize --output={self.directory}"
            )
        self.index = Index.read(file)
        self.tokenizer = Tokenizer.load(self.directory)
        if self.tokenizer.fingerprint() != self.index.tokenizer:
            raise ValueError(
                f"data source {source!r}: {self.tokenizer.origin} is not the tokenizer that the "
                "shards were made with; restore the file, or make the shards anew"
            )
        self._check_files()
        self.token_count = sum(shard.tokens for shard in self.index.shards)
        self.unit_tokens = np.array(self.index.unit_tokens, np.int64)
        self._bounds = np.cumsum([0, *(shard.documents for shard in self.index.shards)])
        self._reader = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """What a run's manifest keeps of the shards: the same for any size of shards."""
        return (FileRecord(FOLDER, self.token_count, self.index.fingerprint),)

    @property
    def document_count(self) -> int:
        """Documents of all shards."""
        return int(self._bounds[-1])

    def counts(self, size: int) -> Int[np.ndarray, "V"]:
        """How often each of `size` ids occurs."""
        counts = np.array(self.index.token_counts, np.int64)
        return np.pad(counts, (0, size - len(counts)))

    def table(self, unit: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Tokens of each document of a unit, and its shard and first record as one number."""
        first = unit * order.UNIT_DOCUMENTS
        last = min(first + order.UNIT_DOCUMENTS, self.document_count)
        lengths, places = [], []
        for shard in range(*np.searchsorted(self._bounds, [first + 1, last]) + [-1, 0]):
            start = self._bounds[shard]
            own = slice(max(0, first - start), last - start)
            every = self._lengths(shard)
            pieces = -(-every // PIECE_TOKENS)
            lengths.append(every[own])
            places.append((np.cumsum(pieces) - pieces + (shard << _RECORD_BITS))[own])
        return np.concatenate(lengths), np.concatenate(places)

    def piece(self, place: int, start: int, count: int) -> Integer[np.ndarray, "count"]:
        """Tokens start .. start + count of the document at a place."""
        shard, record = place >> _RECORD_BITS, place & ((1 << _RECORD_BITS) - 1)
        first, last = start // PIECE_TOKENS, (start + count - 1) // PIECE_TOKENS
        parts = [self._read(shard, record + number) for number in range(first, last + 1)]
        found = np.frombuffer(b"".join(parts), self.index.dtype)
        begin = start - first * PIECE_TOKENS
        if len(found) < begin + count:
            raise _damaged(self._path(shard), f"record {record} is shorter than its document")
        return found[begin : begin + count]

    def held_out(self) -> tuple[Document, ...]:
        """The held-out documents, as texts."""
        path = self._folder / self.index.held_out.name
        try:
            reader = _reader(path)
            found = [json.loads(record) for record in reader.read_all()]
            if len(found) != self.index.held_out.documents:
                raise ValueError(
                    f"{len(found)} documents instead of {self.index.held_out.documents}"
                )
            return tuple(Document(one["text"], one["name"]) for one in found)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise _damaged(path, str(error)) from None

    def describe(self) -> str:
        """A line for the user of a run."""
        return (
            f"{self.source}: {self.document_count:,} documents in {len(self.index.shards)} shards, "
            f"{self.index.held_out.documents} held out when the shards were made "
            f"(held_out_fraction={self.index.held_out_fraction})"
        )

    @property
    def _folder(self) -> Path:
        return self.directory / FOLDER

    def _path(self, shard: int) -> Path:
        return self._folder / self.index.shards[shard].name

    def _check_files(self) -> None:
        files = [*self.index.shards, self.index.held_out]
        hashed = sum(shard.bytes for shard in files) <= MOST_HASHED_BYTES
        for shard in files:
            if fault := file_fault(self._folder / shard.name, shard, hashed=hashed):
                raise _damaged(self._folder / shard.name, fault)

    def _lengths(self, shard: int) -> Int[np.ndarray, "documents"]:
        entry = self.index.shards[shard]
        record = self._reader(shard).num_records() - 1
        lengths = np.frombuffer(self._read(shard, record), LENGTH).astype(np.int64)
        pieces = int((-(-lengths // PIECE_TOKENS)).sum())
        if len(lengths) != entry.documents or pieces != record or lengths.sum() != entry.tokens:
            raise _damaged(self._path(shard), "its table of lengths does not fit the index")
        return lengths

    def _read(self, shard: int, record: int) -> bytes:
        try:
            return self._reader(shard).read([record])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise _damaged(self._path(shard), str(error)) from None

    def _open(self, shard: int) -> Any:
        return _reader(self._path(shard))


def file_fault(path: Path, shard: Shard, *, hashed: bool) -> str | None:
    """What is wrong with a shard's file; None where it is whole."""
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return f"it has {size} bytes instead of {shard.bytes}"
        if hashed and sha256_of(path) != shard.sha256:
            return f"its SHA-256 is not the one in {INDEX}"
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reader(path: Path) -> Any:
    """A reader of a file's records. The library opens what is not there as an empty file."""
    from array_record.python import array_record_module

    if not path.is_file():
        raise _damaged(path, "it is missing")
    reader = array_record_module.ArrayRecordReader(str(path), _READ_OPTIONS)
    if reader.num_records() == 0:
        raise _damaged(path, "it holds no records: it was cut short or is another file")
    return reader


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"token shard {path} cannot be used: {why.splitlines()[0][:200]}; every file of the index "
        "must be there as it was made: restore it, or make the shards anew in another directory"
    )


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
