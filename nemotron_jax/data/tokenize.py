"""Token shards of text, made once by many processes: python -m nemotron_jax.data.tokenize.

Reads the sources twice: to know their documents, and to write them as ids. Killed and begun again
with the same settings it goes on; the files are the same bytes for any number of workers.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nemotron_jax.config.checks import local_path
from nemotron_jax.data import order, shard_maker
from nemotron_jax.data.held_out import (
    LARGEST_SHARED_FRACTION,
    Border,
    Draws,
    Grams,
    nothing_left,
)
from nemotron_jax.data.processes import REPORT_SECONDS, in_processes
from nemotron_jax.data.shard_maker import MOST_HELD_OUT_BYTES, Job, Scan, Task
from nemotron_jax.data.shards import (
    FOLDER,
    FORMAT_VERSION,
    HELD_OUT,
    INDEX,
    Index,
    Shard,
    TokenShards,
)
from nemotron_jax.data.sources import Document, FileRecord, Manifest, files_of, no_text
from nemotron_jax.data.tokenizer import Tokenizer, train_tokenizer
from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import TOKENIZER

TRAIN_PREFIX = "train:"
SETTINGS = "settings.json"
# Bytes of text that become about one token: files are dealt to tasks of about `shard_tokens`.
BYTES_PER_TOKEN = 4

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tokenised, and how. `tokenizer` is a path, or train:N for N ids learned anew."""

    sources: tuple[str, ...]
    tokenizer: str
    output: Path
    shard_tokens: int = 100_000_000
    workers: int = 1
    held_out_fraction: float = 0.05

    def __post_init__(self) -> None:
        for source in self.sources:
            local_path("", "sources", source.partition(":")[2])
        local_path("", "tokenizer", self.tokenizer)
        local_path("", "output", self.output)
        if not all(self.sources):
            raise ValueError(f"--sources={','.join(self.sources)}: names an empty source")
        for flag in ("shard_tokens", "workers"):
            if not 1 <= getattr(self, flag) < 2**31:
                raise ValueError(f"--{flag}={getattr(self, flag)}: must be at least 1, below 2^31")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"--held_out_fraction={self.held_out_fraction}: must lie between 0 and 1"
            )
        size = self.tokenizer.removeprefix(TRAIN_PREFIX)
        if size != self.tokenizer and not (size.isascii() and size.isdigit() and len(size) < 10):
            raise ValueError(
                f"--tokenizer={self.tokenizer}: names no number of ids; as in {TRAIN_PREFIX}32768"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make token shards as the arguments say. Gives the exit status: 2 for wrong input, else 0."""
    try:
        given = vars(_parser().parse_args(arguments))
        options = Options(**given | {"sources": tuple(given["sources"].split(","))})
        tokenize(options, functools.partial(print, flush=True))
    except ValueError as error:
        print(f"tokenize: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tokenize: {error}; what is done stays: begin again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenize: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def tokenize(options: Options, progress: Progress = print) -> None:
    """Make the token shards of the options, or what is still missing of them.

    Raises ValueError for a source that cannot be read, and for a directory that holds something
    else or that was begun with other settings.
    """
    given = None
    if not options.tokenizer.startswith(TRAIN_PREFIX):
        given = Tokenizer.load(options.tokenizer)
    tasks = _tasks(options)
    scans = _scan(options, tasks, progress)
    manifest = _manifest(options, tasks, scans)
    settings = {
        "documents": manifest.fingerprint(),
        "tokenizer": given.fingerprint() if given else options.tokenizer,
        "shard_tokens": options.shard_tokens,
        "held_out_fraction": options.held_out_fraction,
        "format_version": FORMAT_VERSION,
    }
    if _is_finished(options.output, settings):
        progress(
            f"{options.output} is complete: {TokenShards(f'shards:{options.output}').describe()}"
        )
        return
    _begin(options.output, settings)
    borders, candidates = _split(options, tasks, scans)
    tokenizer = given or _trained(options, tasks, borders, progress)
    tokenizer.save(options.output)
    grams = Grams.of([document.text for document in candidates])
    job = Job(options.output, tokenizer, options.shard_tokens, borders, grams)
    _make(job, options.workers, tasks, scans, progress)
    index = _index(job, tasks, candidates, manifest, settings)
    with atomic_writer(options.output / INDEX) as file:
        file.write(index.to_json())
    shutil.rmtree(shard_maker.work_of(options.output))
    progress(f"{options.output}: {TokenShards(f'shards:{options.output}').describe()}")


def _tasks(options: Options) -> list[Task]:
    """Each source's files in runs of about `shard_tokens`."""
    tasks: list[Task] = []
    for source in options.sources:
        files, size = [], 0
        found = files_of(source)
        for name, path in found.named():
            files.append((name, str(path)))
            size += path.stat().st_size
            if size >= BYTES_PER_TOKEN * options.shard_tokens:
                tasks.append(Task(len(tasks), source, tuple(files)))
                files, size = [], 0
        if files:
            tasks.append(Task(len(tasks), source, tuple(files)))
    return tasks


def _scan(options: Options, tasks: list[Task], progress: Progress) -> list[Scan]:
    total = sum(Path(path).stat().st_size for task in tasks for _, path in task.files)
    clock = _Clock("read", "bytes", total, progress)
    function = functools.partial(_scan_one, options.held_out_fraction)
    scans: list[Scan | None] = [None] * len(tasks)
    kept = 0
    for number, found in in_processes(function, tasks, options.workers, clock.add):
        kept += found.candidate_bytes
        if kept > MOST_HELD_OUT_BYTES:  # refused below, once all are counted
            found.candidates = []
        scans[number] = found
    if kept > MOST_HELD_OUT_BYTES:
        fraction = 0.8 * options.held_out_fraction * MOST_HELD_OUT_BYTES / kept
        raise ValueError(
            f"--held_out_fraction={options.held_out_fraction}: holds out {kept:,} bytes of text, "
            f"and {MOST_HELD_OUT_BYTES:,} are the most; use --held_out_fraction={fraction:.1g}"
        )
    return scans


def _scan_one(fraction: float, task: Task, done: shard_maker.Count) -> Scan:
    return shard_maker.scan(task, fraction, done)


def _manifest(options: Options, tasks: list[Task], scans: list[Scan]) -> Manifest:
    files: dict[str, list[FileRecord]] = {source: [] for source in options.sources}
    for task, found in zip(tasks, scans, strict=True):
        files[task.source] += found.files
    parts = tuple(tuple(files[source]) for source in options.sources)
    return Manifest(options.sources, parts, options.held_out_fraction)


def _split(
    options: Options, tasks: list[Task], scans: list[Scan]
) -> tuple[dict[str, Border], list[Document]]:
    """Each source's border, and the documents that may be held out."""
    borders: dict[str, Border] = {}
    candidates: list[Document] = []
    for source in options.sources:
        own = [found for task, found in zip(tasks, scans, strict=True) if task.source == source]
        draws = Draws()
        for found in own:
            draws.join(found.draws)
        if draws.count == 0:
            raise no_text(files_of(source))
        borders[source] = Border.of(source, draws, options.held_out_fraction)
        documents = (document for found in own for _, document in found.candidates)
        parts = (borders[source].parts(document)[1] for document in documents)
        candidates += [part for part in parts if part is not None]
    return borders, candidates


def _is_finished(directory: Path, settings: dict[str, Any]) -> bool:
    if not (directory / INDEX).exists():
        return False
    made = Index.read(directory / INDEX).settings
    if made != settings:
        raise _other_settings(directory, made, settings)
    shutil.rmtree(shard_maker.work_of(directory), ignore_errors=True)
    return True


def _begin(directory: Path, settings: dict[str, Any]) -> None:
    """Make the folders, or see that they were begun with these settings."""
    file = shard_maker.work_of(directory) / SETTINGS
    if file.exists():
        made = json.loads(file.read_text())
        if made != settings:
            raise _other_settings(directory, made, settings)
    elif (directory / FOLDER).exists() and any((directory / FOLDER).iterdir()):
        raise ValueError(
            f"--output={directory}: holds {FOLDER}/ of another making; name another directory"
        )
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    with atomic_writer(file) as out:
        out.write(json.dumps(settings).encode())


def _other_settings(directory: Path, made: dict, settings: dict) -> ValueError:
    names = [name for name in settings if made.get(name) != settings[name]]
    return ValueError(
        f"--output={directory}: was begun with other {' and '.join(names)}; "
        "restore them, or name another directory"
    )


def _trained(
    options: Options, tasks: list[Task], borders: dict[str, Border], progress: Progress
) -> Tokenizer:
    if (options.output / TOKENIZER).exists():  # begun before with these settings
        return Tokenizer.load(options.output)
    size = int(options.tokenizer.removeprefix(TRAIN_PREFIX))
    progress(f"tokenizer: learning {size} ids from the training text")
    texts = (shard_maker.training_texts(task, borders[task.source]) for task in tasks)
    return train_tokenizer(itertools.chain.from_iterable(texts), size)


def _make(job: Job, workers: int, tasks: list[Task], scans: list[Scan], progress: Progress) -> None:
    todo = [task for task in tasks if shard_maker.parts_of(job, task) is None]
    characters = sum(scans[task.number].characters for task in todo)
    clock = _Clock("tokenised", "characters", characters, progress)
    for _ in in_processes(
        functools.partial(shard_maker.make_shards, job), todo, workers, clock.add
    ):
        pass


def _index(
    job: Job,
    tasks: list[Task],
    candidates: list[Document],
    manifest: Manifest,
    settings: dict[str, Any],
) -> Index:
    shards: list[Shard] = []
    counts = np.zeros(job.tokenizer.vocab_size, np.int64)
    seen = np.zeros(len(job.grams.known), bool)
    lengths: list[np.ndarray] = []
    unit_tokens: list[int] = []
    for task in tasks:
        for part in shard_maker.parts_of(job, task) or []:
            shards.append(part.shard)
            counts += part.counts
            seen[part.seen] = True
            lengths.append(part.lengths)
            lengths, whole = _units(lengths)
            unit_tokens += whole
    unit_tokens += [int(sum(part.sum() for part in lengths))] if lengths else []
    repeated = job.grams.fractions(seen) > LARGEST_SHARED_FRACTION
    pairs = list(zip(candidates, repeated, strict=True))
    held_out = [document for document, is_repeated in pairs if not is_repeated]
    if not held_out:
        raise nothing_left(manifest.sources, len(candidates))
    joined = json.dumps([FORMAT_VERSION, manifest.fingerprint(), job.tokenizer.fingerprint()])
    return Index(
        fingerprint=hashlib.sha256(joined.encode()).hexdigest(),
        settings=settings,
        tokenizer=job.tokenizer.fingerprint(),
        held_out_fraction=manifest.held_out_fraction,
        dtype=shard_maker.dtype_of(job.tokenizer).str,
        unit_documents=order.UNIT_DOCUMENTS,
        unit_tokens=unit_tokens,
        token_counts=counts.tolist(),
        shards=shards,
        held_out=_write_held_out(job.directory, held_out),
        dropped=[document.name for document, is_repeated in pairs if is_repeated],
    )


def _units(lengths: list[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """The lengths that fill no unit yet, and the tokens of the units that are full."""
    size = order.UNIT_DOCUMENTS
    joined = np.concatenate(lengths).astype(np.int64)
    whole = len(joined) // size * size
    rest = [joined[whole:]] if whole < len(joined) else []
    return rest, joined[:whole].reshape(-1, size).sum(axis=1).tolist()


def _write_held_out(directory: Path, documents: list[Document]) -> Shard:
    writer, temporary = shard_maker.record_writer(directory, HELD_OUT)
    for document in documents:
        writer.write(json.dumps({"name": document.name, "text": document.text}).encode())
    return shard_maker.put(directory, writer, temporary, HELD_OUT, len(documents), 0)


class _Clock:
    """Says now and then how much of a work is done, and how long the rest will take."""

    def __init__(self, verb: str, unit: str, total: int, progress: Progress) -> None:
        self._verb, self._unit, self._total, self._progress = verb, unit, total, progress
        self._done = 0
        self._began = self._said = time.monotonic()

    def add(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said < REPORT_SECONDS or self._done == 0:
            return
        self._said = now
        rate = self._done / (now - self._began)
        left = max(0, self._total - self._done) / rate
        self._progress(
            f"{self._verb} {self._done:,} of {self._total:,} {self._unit} "
            f"({self._done / max(1, self._total):.0%}), {rate / 1e6:.2f} M a second, "
            f"{left // 3600:.0f} h {left % 3600 // 60:02.0f} min {left % 60:02.0f} s left"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows the flags")


def _whole_number(text: str) -> int:
    """1e8 as a number of tokens; ValueError for anything that is no whole number."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m nemotron_jax.data.tokenize", description=__doc__)
    add = parser.add_argument
    add("--sources", required=True, help="python_stdlib or hf:PATH, several with commas between")
    add("--tokenizer", required=True, help="a tokenizer.json or its directory, or train:N")
    add("--output", required=True, type=Path, help="the directory of the shards")
    add("--shard_tokens", type=_whole_number, default=100_000_000, help="where a shard is closed")
    add("--workers", type=_whole_number, default=os.cpu_count() or 1, help="processes")
    add("--held_out_fraction", type=float, default=0.05, help="of documents, not trained on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
