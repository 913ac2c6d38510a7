"""A run's tokenizer and token arrays, made once and found again when the run resumes."""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.held_out import Split
from nemotron_jax.data.opened import (
    Opened,
    describe_source,
    in_order,
    open_sources,
    shards_of,
    split_sources,
)
from nemotron_jax.data.packing import DocumentTokens, Stream
from nemotron_jax.data.shards import SHARDS_PREFIX, TokenShards
from nemotron_jax.data.sources import Document, Manifest, manifest_of
from nemotron_jax.data.tokenizer import (
    Tokenizer,
    check_end,
    check_vocabulary,
    train_tokenizer,
)
from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import TOKENIZER, RunDirectory
from nemotron_jax.types import Batch

FORMAT_VERSION = 1
TRAIN_TOKENIZER = "train"  # the value of DataConfig.tokenizer that asks for a new one
MANY_TIMES = 100  # readings of a text from which on a run is warned
ENCODED_TOGETHER = 256  # documents whose ids are Python lists at one time

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class HeldOutFacts:
    """Numbers of the held-out text that a model's loss is read against."""

    bytes: int  # UTF-8 bytes of the text
    tokens: int  # ids, one eos a document included
    unigram_entropy: float  # nats a token under the training frequencies with add-one smoothing
    gzip_bits_per_byte: float  # of the documents joined, at gzip's level 9


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised training documents of each source and held-out documents of all.

    `fingerprint` is one SHA-256 over the data's manifest and the tokenizer.
    """

    train: tuple[DocumentTokens | TokenShards, ...]
    held_out: DocumentTokens
    byte_lengths: Int[np.ndarray, "V"]  # bytes of text that each id stands for
    facts: HeldOutFacts
    fingerprint: str

    def streams(self, seed: int) -> list[Stream]:
        """The rows of each source."""
        return [Stream(documents, seed, source) for source, documents in enumerate(self.train)]

    def bytes_of(self, batch: Batch) -> Int[np.ndarray, "B"]:
        """UTF-8 bytes that the scored next tokens of each row spell; eos spells none.

        Bits per byte = summed next-token loss in nats / ln 2 / these bytes.
        """
        lengths = self.byte_lengths[np.asarray(batch.targets[..., 0])].astype(np.int64)
        return np.where(np.asarray(batch.weights[..., 0]) > 0, lengths, 0).sum(axis=-1)


def prepare(
    data: DataConfig,
    vocab_size: int,
    directory: str | Path,
    *,
    eos_token: int | None = None,
    progress: Progress = print,
) -> tuple[Tokenizer, Corpus]:
    """The tokenizer and the corpus of a run, from its directory where they are there already.

    Writes directory/tokenizer.json, corpus/*.npy and, last, corpus/manifest.json. `progress` gets
    a line about each part. Raises ValueError when the data or the tokenizer are not those that the
    directory was made with, when a source cannot be read, when the tokenizer exceeds `vocab_size`
    or was trained for another, or when it does not end documents with the model's `eos_token`.
    """
    directory = Path(directory)
    folder = RunDirectory(directory).corpus
    opened = open_sources(data)
    manifest = manifest_of(opened, data.held_out_fraction)
    for source in opened:
        progress(describe_source(source))
    stored = _read_stored(directory)
    if stored is not None:
        _check_same_data(directory, Manifest.from_json(stored["manifest"]), manifest)
    tokenizer = _existing_tokenizer(data, directory, stored, shards_of(opened))
    if tokenizer is not None:
        check_vocabulary(tokenizer, vocab_size)
        check_end(tokenizer, eos_token)
        _check_trained_for(data, directory, stored, vocab_size)
        if stored is not None and (corpus := _load(directory, stored, tokenizer, opened)):
            progress(f"{folder}: {_describe(corpus)}, as stored with the run")
            return tokenizer, corpus
        if stored is not None:
            progress(f"{folder}: stored arrays are missing or damaged, making new ones")
    split = split_sources(opened, data)
    progress(
        f"held out: {len(split.held_out)} documents; "
        f"{len(split.dropped)} more dropped as near-duplicates of training text"
    )
    if tokenizer is None:
        texts = [document.text for part in split.train for document in part]
        tokenizer = train_tokenizer(texts, vocab_size)
        check_end(tokenizer, eos_token)
        progress(f"tokenizer: {tokenizer.vocab_size} ids learned from {len(texts)} documents")
    tokenizer.save(directory)
    corpus = build_corpus(split, opened, tokenizer, manifest)
    progress(f"{folder}: {_describe(corpus)}")
    _save(directory, corpus, tokenizer, manifest, split, vocab_size)
    return tokenizer, corpus


def repetitions(corpus: Corpus, data: DataConfig, steps: int) -> list[str]:
    """A line for each source that a run reads so often that a model learns it by heart."""
    lines, length = [], data.sequence_length
    sizes = [part.token_count for part in corpus.train]
    for source, size, times in zip(
        data.sources, sizes, times_read(sizes, data, steps), strict=True
    ):
        if times >= MANY_TIMES or size < length:
            lines.append(
                f"{source} has {size:,} training tokens, in rows of {length:,}; the run reads them "
                f"{times:,.0f} times over: add text, or lower training.steps"
            )
    return lines


def times_read(sizes: Sequence[int], data: DataConfig, steps: int) -> list[float]:
    """How often a run reads each source, whose tokens are counted in `sizes`."""
    tokens = steps * data.batch_size * data.sequence_length
    whole = sum(data.source_weights)
    return [
        tokens * weight / whole / size
        for size, weight in zip(sizes, data.source_weights, strict=True)
    ]


def build_corpus(
    split: Split,
    opened: Sequence[Opened],
    tokenizer: Tokenizer,
    manifest: Manifest,
) -> Corpus:
    """The split's documents as ids, each closed by eos, with the facts of its held-out part."""
    train = in_order(opened, (tokenize(documents, tokenizer) for documents in split.train))
    held_out = tokenize(split.held_out, tokenizer)
    counts = sum(documents.counts(tokenizer.vocab_size) for documents in train)
    text = "".join(document.text for document in split.held_out).encode()
    facts = HeldOutFacts(
        bytes=len(text),
        tokens=len(held_out.tokens),
        unigram_entropy=unigram_entropy(counts, held_out.tokens),
        gzip_bits_per_byte=8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
    )
    fingerprint = _fingerprint(manifest, tokenizer)
    return Corpus(train, held_out, tokenizer.byte_lengths, facts, fingerprint)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> DocumentTokens:
    """The documents' ids, each followed by eos; no bos, as in the family's pre-training."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts: list[np.ndarray] = []
    for first in range(0, len(documents), ENCODED_TOGETHER):
        texts = [document.text for document in documents[first : first + ENCODED_TOGETHER]]
        parts += [np.array([*ids, tokenizer.eos], dtype) for ids in tokenizer.encode_batch(texts)]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return DocumentTokens(np.concatenate(parts), offsets)


def unigram_entropy(counts: Int[np.ndarray, "V"], tokens: Integer[np.ndarray, "N"]) -> float:
    """Mean nats that `tokens` cost under the smoothed frequencies (counts + 1) / sum."""
    smoothed = counts.astype(np.float64) + 1
    return float(-np.log(smoothed / smoothed.sum())[tokens].mean())


def _describe(corpus: Corpus) -> str:
    tokens = sum(documents.token_count for documents in corpus.train)
    return f"{tokens:,} training tokens, {corpus.facts.tokens:,} held out"


def _fingerprint(manifest: Manifest, tokenizer: Tokenizer) -> str:
    joined = f"{manifest.fingerprint()} {tokenizer.fingerprint()}"
    return hashlib.sha256(joined.encode()).hexdigest()


def _manifest_path(directory: Path) -> Path:
    return RunDirectory(directory).corpus / "manifest.json"


def _read_stored(directory: Path) -> dict[str, Any] | None:
    path = _manifest_path(directory)
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text("utf-8"))
        version = stored["format_version"]
        _check_keys(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); "
            f"remove the folder {path.parent} and it is made anew"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={version}, this code writes {FORMAT_VERSION}; "
            f"remove the folder {path.parent} and it is made anew"
        )
    return stored


def _check_keys(stored: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless a manifest holds what is read of it."""
    Manifest.from_json(stored["manifest"])
    HeldOutFacts(**stored["held_out_facts"])
    for name, kind in {"fingerprint": str, "tokenizer": str, "arrays": dict}.items():
        if not isinstance(stored[name], kind):
            raise TypeError(f"{name} is {stored[name]!r}")


def _check_trained_for(
    data: DataConfig, directory: Path, stored: dict[str, Any] | None, vocab_size: int
) -> None:
    """Raise ValueError where the directory's tokenizer was trained for another vocabulary."""
    trained_for = (stored or {}).get("vocab_size", vocab_size)
    if data.tokenizer.startswith(TRAIN_TOKENIZER) and trained_for != vocab_size:
        raise ValueError(
            f"the tokenizer of run {directory} was trained for model.vocab_size={trained_for}, not "
            f"{vocab_size}; restore that value, or start in a new directory"
        )


def _check_same_data(directory: Path, before: Manifest, now: Manifest) -> None:
    if before.fingerprint() == now.fingerprint():
        return
    lines = before.differences(now) or ["the files' order changed"]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    raise ValueError(
        f"the data of run {directory} changed since it began: {'; '.join(lines[:3])}{more}; "
        "restore the data, or start in a new directory"
    )


def _existing_tokenizer(
    data: DataConfig,
    directory: Path,
    stored: dict[str, Any] | None,
    shards: Sequence[TokenShards],
) -> Tokenizer | None:
    """The run's, the configured or the shards' tokenizer; None when one is still to be trained."""
    given = None if data.tokenizer == TRAIN_TOKENIZER else Tokenizer.load(data.tokenizer)
    given = given or (shards[0].tokenizer if shards else None)
    for source in shards:
        if source.index.tokenizer != given.fingerprint():
            raise ValueError(
                f"data source {source.source!r} was made with another tokenizer than "
                f"{given.origin}; set data.tokenizer={str(source.directory)!r}, or make all shards "
                "with one tokenizer"
            )
    own = Tokenizer.load(directory) if RunDirectory(directory).tokenizer.exists() else None
    if own is None and stored is not None and given is None:
        raise ValueError(
            f"run {directory} has a corpus and no {TOKENIZER}; restore the file, "
            "or start in a new directory"
        )
    for tokenizer in filter(None, (own, given)):
        if stored is not None and tokenizer.fingerprint() != stored["tokenizer"]:
            raise ValueError(
                f"tokenizer {tokenizer.origin} is not the one that the corpus of run {directory} "
                "was made with; restore it, or start in a new directory"
            )
    if own is not None and given is not None and own.fingerprint() != given.fingerprint():
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r} differs from {own.origin}, which run {directory} "
            "already has; name the same tokenizer, or start in a new directory"
        )
    return own or given


def _arrays(directory: Path, sources: Sequence[str]) -> list[tuple[Path, Path]]:
    """Token and offset files: a pair for each text source, then the one of held-out text."""
    numbers = [n for n, source in enumerate(sources) if not source.startswith(SHARDS_PREFIX)]
    names = [f"train_{number}" for number in numbers] + ["held_out"]
    folder = RunDirectory(directory).corpus
    return [(folder / f"{name}.tokens.npy", folder / f"{name}.offsets.npy") for name in names]


def _save(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    manifest: Manifest,
    split: Split,
    vocab_size: int,
) -> None:
    sums = {}
    pairs = _arrays(directory, manifest.sources)
    texts = [documents for documents in corpus.train if isinstance(documents, DocumentTokens)]
    for paths, documents in zip(pairs, (*texts, corpus.held_out), strict=True):
        for path, array in zip(paths, (documents.tokens, documents.offsets), strict=True):
            with atomic_writer(path) as file:
                np.save(file, array)
            sums[path.name] = _sha256(path)
    stored = {
        "format_version": FORMAT_VERSION,
        "fingerprint": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": vocab_size,  # that the tokenizer was trained or chosen for
        "held_out_facts": dataclasses.asdict(corpus.facts),
        "held_out": [document.name for document in split.held_out],
        "dropped": list(split.dropped),
        "arrays": sums,
        "manifest": manifest.to_json(),
    }
    with atomic_writer(_manifest_path(directory)) as file:
        file.write(json.dumps(stored, indent=1).encode())


def _load(
    directory: Path,
    stored: dict[str, Any],
    tokenizer: Tokenizer,
    opened: Sequence[Opened],
) -> Corpus | None:
    """The stored corpus, its arrays mapped from their files; None when one is not whole."""
    pairs = _arrays(directory, [source.source for source in opened])
    for path in (path for pair in pairs for path in pair):
        if not path.exists() or _sha256(path) != stored["arrays"].get(path.name):
            return None
    *texts, held_out = (
        DocumentTokens(np.load(tokens, mmap_mode="r"), np.load(offsets))
        for tokens, offsets in pairs
    )
    facts = HeldOutFacts(**stored["held_out_facts"])
    train = in_order(opened, texts)
    return Corpus(train, held_out, tokenizer.byte_lengths, facts, stored["fingerprint"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
