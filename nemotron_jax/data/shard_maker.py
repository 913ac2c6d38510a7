"""What one process does for token shards: read the files of a task, and write its shards.

A task is a run of files of one source, a function of the files' sizes and of `shard_tokens` alone.
Its shards are a function of the task, whichever process makes them and however often it was killed.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from nemotron_jax.data.held_out import Border, Draws, Grams
from nemotron_jax.data.shards import (
    ENDING,
    FOLDER,
    LENGTH,
    PIECE_TOKENS,
    Shard,
    file_fault,
    sha256_of,
)
from nemotron_jax.data.sources import (
    Document,
    FileRecord,
    check_skipped,
    documents_in,
    opened,
)
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.files import atomic_writer

WORK = ".work"  # of an unfinished directory; removed in the end
# Documents encoded together, and characters from which on no more come along: their ids are Python
# lists, some 40 bytes each.
ENCODED_DOCUMENTS, ENCODED_CHARACTERS = 256, 1 << 20
# Bytes of held-out text, whose word sequences stay in the memory of each process: some 4 bytes a
# byte. 64 MB are about 16 million tokens; a loss is known to 0.1 % from a tenth of them.
MOST_HELD_OUT_BYTES = 64_000_000
# Compressing at the fastest level halves the files of 32-bit ids for 6 µs a record when it is read.
# One record a group: each is found and read by itself.
WRITE_OPTIONS = "group_size:1,zstd:1"
COUNTED_TOGETHER = 1 << 20  # ids kept until they are counted

Count = Callable[[int], None]  # takes a number of characters or bytes that are done


@dataclasses.dataclass(frozen=True)
class Task:
    """Files of one source whose documents become shards of their own."""

    number: int
    source: str
    files: tuple[tuple[str, str], ...]  # name and path


@dataclasses.dataclass
class Scan:
    """What a task's files hold."""

    draws: Draws
    characters: int
    files: list[FileRecord]
    candidates: list[tuple[float, Document]]  # that may be held out, with their draws
    candidate_bytes: int  # of all of them; their texts are kept up to MOST_HELD_OUT_BYTES


@dataclasses.dataclass(frozen=True)
class Job:
    """What all tasks share."""

    directory: Path
    tokenizer: Tokenizer
    shard_tokens: int
    borders: dict[str, Border]
    grams: Grams


@dataclasses.dataclass(frozen=True)
class Part:
    """A finished shard of a task, as its record in the work folder says."""

    shard: Shard
    consumed: int  # documents of the task up to its end, held-out ones too
    lengths: Int[np.ndarray, "documents"]
    counts: Int[np.ndarray, "V"]
    seen: Int[np.ndarray, "found"]  # grams of held-out text that occur in the shard's documents


def scan(task: Task, fraction: float, done: Count) -> Scan:
    """Read a task's files once: what they are, and which documents may be held out."""
    found = Scan(Draws(), 0, [], [], 0)
    lowest: tuple[float, Document] | None = None
    for document in _documents(task, found.files, done):
        draw = found.draws.add(document.name)
        found.characters += len(document.text)
        if draw <= fraction:
            found.candidate_bytes += len(document.text.encode())
            if found.candidate_bytes <= MOST_HELD_OUT_BYTES:
                found.candidates.append((draw, document))
        elif draw == found.draws.lowest:  # held out where none is below the fraction
            lowest = draw, document
    if lowest is not None and found.draws.lowest == lowest[0]:
        found.candidates.append(lowest)
    return found


def training_texts(task: Task, border: Border) -> Iterator[str]:
    """The texts of a task that a tokenizer may learn from."""
    for document in _documents(task):
        train, _ = border.parts(document)
        if train is not None:
            yield train.text


def make_shards(job: Job, task: Task, done: Count) -> None:
    """Write the shards of a task that are not there yet."""
    whole = _whole_parts(job, task)
    consumed = whole[-1].consumed if whole else 0
    writer = _ShardWriter(job, task, len(whole))
    documents = _documents(task)
    done(sum(len(document.text) for document in itertools.islice(documents, consumed)))
    for batch in _batches(documents):
        parts = [job.borders[task.source].parts(document)[0] for document in batch]
        ids = iter(job.tokenizer.encode_batch([train.text for train in parts if train is not None]))
        for train in parts:
            consumed += 1
            if train is not None:
                writer.add(train.text, next(ids))
            if writer.tokens >= job.shard_tokens:
                writer.close(consumed)
                writer = _ShardWriter(job, task, writer.number + 1)
        done(sum(len(document.text) for document in batch))
    count = writer.number + (writer.tokens > 0)
    writer.close(consumed)
    with atomic_writer(_end(job.directory, task.number)) as file:
        file.write(str(count).encode())


def parts_of(job: Job, task: Task) -> list[Part] | None:
    """The records of a finished task's shards; None where it is not finished."""
    end = _end(job.directory, task.number)
    if not end.exists():
        return None
    parts, count = _whole_parts(job, task), int(end.read_text())
    return parts if len(parts) == count else None


def work_of(directory: Path) -> Path:
    """The folder of what is not finished yet, inside the shards' directory."""
    return directory / WORK


class _ShardWriter:
    """One shard: written in the work folder, put in its place when it is whole."""

    def __init__(self, job: Job, task: Task, number: int) -> None:
        self._job, self.number = job, number
        self._stem = f"{task.number:06}-{number:05}"
        self.tokens = 0
        self._dtype = dtype_of(job.tokenizer)
        self._lengths: list[int] = []
        self._uncounted: list[np.ndarray] = []
        self._counts = np.zeros(job.tokenizer.vocab_size, np.int64)
        self._seen = np.zeros(len(job.grams.known), bool)
        self._writer = self._temporary = None

    def add(self, text: str, ids: list[int]) -> None:
        if self._writer is None:
            self._writer, self._temporary = record_writer(self._job.directory, self._stem)
        tokens = np.array([*ids, self._job.tokenizer.eos], self._dtype)
        for start in range(0, len(tokens), PIECE_TOKENS):
            self._writer.write(tokens[start : start + PIECE_TOKENS].tobytes())
        self._lengths.append(len(tokens))
        self._seen[self._job.grams.found_in(text)] = True
        before, self.tokens = self.tokens, self.tokens + len(tokens)
        self._uncounted.append(tokens)
        if before // COUNTED_TOGETHER != self.tokens // COUNTED_TOGETHER:
            self._count()

    def close(self, consumed: int) -> None:
        """Put the shard in its place, then its record; nothing where there are no documents."""
        if self._writer is None:
            return
        self._count()
        lengths = np.array(self._lengths, LENGTH)
        self._writer.write(lengths.tobytes())
        directory = self._job.directory
        shard = put(directory, self._writer, self._temporary, self._stem, len(lengths), self.tokens)
        meta = json.dumps({"shard": dataclasses.asdict(shard), "consumed": consumed})
        with atomic_writer(work_of(directory) / f"{self._stem}.npz") as file:
            np.savez(
                file,
                meta=np.array(meta),
                lengths=lengths,
                counts=self._counts,
                seen=np.flatnonzero(self._seen),
            )

    def _count(self) -> None:
        joined: Integer[np.ndarray, "N"] = np.concatenate(self._uncounted or [np.zeros(0, int)])
        self._counts += np.bincount(joined, minlength=len(self._counts))
        self._uncounted = []


def record_writer(directory: Path, stem: str) -> tuple[Any, Path]:
    """A writer of records and the temporary file that it fills."""
    from array_record.python import array_record_module

    handle, temporary = tempfile.mkstemp(dir=work_of(directory), prefix=f".{stem}.")
    os.close(handle)
    return array_record_module.ArrayRecordWriter(temporary, WRITE_OPTIONS), Path(temporary)


def put(
    directory: Path, writer: Any, temporary: Path, stem: str, documents: int, tokens: int
) -> Shard:
    """Close a shard's writer and move its file, on disk by then, to its place."""
    writer.close()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp gives 0600, but shards may be read by others
    name = f"{stem}{ENDING}"
    shard = Shard(name, temporary.stat().st_size, sha256_of(temporary), documents, tokens)
    os.replace(temporary, directory / FOLDER / name)
    return shard


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """As DocumentTokens has in memory; little-endian in files."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _end(directory: Path, number: int) -> Path:
    return work_of(directory) / f"{number:06}.end"


def _whole_parts(job: Job, task: Task) -> list[Part]:
    """The task's shards from its first one on, as far as they are whole."""
    parts: list[Part] = []
    for number in itertools.count():
        record = work_of(job.directory) / f"{task.number:06}-{number:05}.npz"
        if not record.exists():
            return parts
        with np.load(record) as found:
            meta = json.loads(str(found["meta"]))
            shard = Shard(**meta["shard"])
            if file_fault(job.directory / FOLDER / shard.name, shard, hashed=False):
                return parts
            arrays = (found["lengths"], found["counts"], found["seen"])
        parts.append(Part(shard, meta["consumed"], *arrays))


def _documents(
    task: Task, records: list[FileRecord] | None = None, done: Count | None = None
) -> Iterator[Document]:
    """The documents of a task's files, in order. `records` gets what the files are."""
    for name, path in task.files:
        with opened(task.source, name, Path(path)) as file:
            try:
                yield from documents_in(task.source, name, file)
            except UnicodeDecodeError as error:
                check_skipped(task.source, name, error)
                continue
            if records is not None:
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                records.append(FileRecord(name, file.tell(), digest))
                done(file.tell())


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists that are encoded together."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == ENCODED_DOCUMENTS or characters >= ENCODED_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
