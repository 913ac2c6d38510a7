"""How well a model predicts held-out text: per token and per byte, by context and by source."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import PurePath

import numpy as np
from jaxtyping import Bool, Float, Int

from nemotron_jax.config.checks import check, is_integer
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.corpus import Corpus
from nemotron_jax.data.held_out import split_documents
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.data.opened import open_sources
from nemotron_jax.data.packing import HELD_OUT_KEY, Stream
from nemotron_jax.data.shards import TokenShards
from nemotron_jax.data.sources import Collection
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.held_out import token_nats
from nemotron_jax.evaluation.statistics import value_over
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Plot, Result, Suite, Table, Value
from nemotron_jax.model.nemotron import Nemotron

COLUMNS = ("tokens", "nats per token", "low", "high", "documents")
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """`rows` of the held-out text are scored, None for the whole of it."""

    rows: int | None = None

    def __post_init__(self) -> None:
        ok = self.rows is None or (is_integer(self.rows) and self.rows >= 1)
        check(self, "rows", ok, "must be an integer of at least 1, or None for all")


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry for each scored token of the held-out text, each of which is scored once."""

    nats: Float[np.ndarray, "N"]
    bytes: Int[np.ndarray, "N"]  # that the token spells
    context: Int[np.ndarray, "N"]  # tokens of its document that the model saw before it
    document: Int[np.ndarray, "N"]  # its place in the corpus's held-out documents


def measure(context: Context, options: Options) -> Result:
    """The whole held-out text in the rows that training evaluates on.

    Every token with a predecessor in its document is scored once, the end of a document included;
    what lies further back than the row's start is not seen. Documents are the independent things,
    because tokens of one document are alike.
    """
    config = context.subject.require_config("perplexity")
    corpus = context.subject.corpus
    scores = score_held_out(
        context.model,
        corpus,
        config.data,
        rows=options.rows,
        chunk=config.training.loss_chunk,
        execution=config.execution,
        progress=context.progress.at,
    )
    return result_of(scores, corpus, config.data)


def result_of(scores: Scores, corpus: Corpus, data: DataConfig) -> Result:
    """Values `nats_per_token`, `bits_per_byte` and the latter of each source, where there are
    several; what a guess by frequency alone reaches is their chance."""
    entropy = corpus.facts.unigram_entropy
    by_token = value_over(nats_by_document(scores), unit="nats", better="lower", chance=entropy)
    guessed = entropy * len(scores.nats) / math.log(2) / int(scores.bytes.sum())
    by_byte = value_over(bits_by_document(scores), unit="bits", better="lower", chance=guessed)
    fact = functools.partial(Value, better="")
    values = {
        "bits_per_byte": by_byte,
        "nats_per_token": by_token,
        "perplexity": Value(
            math.exp(by_token.mean),
            None if by_token.interval is None else tuple(map(math.exp, by_token.interval)),
            by_token.n,
            chance=math.exp(entropy),
            better="lower",
        ),
        "scored_tokens": fact(len(scores.nats), unit="tokens"),
        "scored_bytes": fact(int(scores.bytes.sum()), unit="bytes"),
        "gzip_bits_per_byte": fact(corpus.facts.gzip_bits_per_byte, unit="bits"),
    }
    sources, names = _sources(scores, data)
    for number, name in names.items() if len(names) > 1 else ():
        part = bits_by_document(_chosen(scores, sources == number))
        values[f"bits_per_byte/{name}"] = value_over(part, unit="bits", better="lower")
    by_context = _groups(scores, _context_bucket(scores.context), _bucket_name)
    by_source = _groups(scores, sources, names.__getitem__)
    return Result(
        values=values,
        tables=(
            Table("By context", ("tokens before", *COLUMNS), by_context),
            Table("By source", ("source", *COLUMNS), by_source),
        ),
        plots=(_context_plot(scores, entropy),),
        headline=("bits_per_byte",),
        says=(_sentence(by_byte, corpus.facts.gzip_bits_per_byte),),
    )


def _sentence(bits: Value, gzip: float) -> str:
    better = "fewer" if bits.mean < gzip else "more"
    return (
        f"A byte of held-out text takes {bits.mean:.3f} bits, {better} than gzip's {gzip:.3f}; "
        f"guessing by frequency takes {bits.chance:.3f}."
    )


def score_held_out(
    model: Nemotron,
    corpus: Corpus,
    data: DataConfig,
    *,
    rows: int | None = None,
    chunk: int = 512,
    execution: Execution = Execution(),
    progress: Progress = lambda done, total, what: None,
) -> Scores:
    """Cross entropy of each token of the first `rows` rows (None: all), and what groups it."""
    whole = held_out_row_count(corpus, data)
    batches = held_out_batches(corpus, data, 0, whole if rows is None else min(rows, whole))
    nats = functools.partial(token_nats, model, chunk=chunk, execution=execution)
    each = []
    for number, batch in enumerate(batches):
        progress(number, len(batches), "batches")
        each.append(nats(batch))
    segments = np.concatenate([batch.segment_ids for batch in batches])
    targets = np.concatenate([batch.targets[..., 0] for batch in batches])
    scored = np.concatenate([batch.weights[..., 0] for batch in batches]) > 0
    return Scores(
        nats=np.concatenate(each).astype(np.float64)[scored],
        bytes=corpus.byte_lengths[targets[scored]].astype(np.int64),
        context=_context(segments)[scored],
        document=documents_of(corpus, scored),
    )


def nats_by_document(scores: Scores) -> dict[str, tuple[float, float]]:
    """By document its nats and its scored tokens."""
    return by_document(scores.document, scores.nats, np.ones_like(scores.nats))


def bits_by_document(scores: Scores) -> dict[str, tuple[float, float]]:
    """By document its bits and its bytes."""
    return by_document(scores.document, scores.nats / math.log(2), scores.bytes)


def by_document(
    document: Int[np.ndarray, "N"], amount: Float[np.ndarray, "N"], size: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Sums of each document that has a size, by its place in the held-out text."""
    amounts, sizes = np.bincount(document, amount), np.bincount(document, size)
    return {
        f"document_{number:05d}": (float(amounts[number]), float(sizes[number]))
        for number in np.flatnonzero(sizes)
    }


def _ready(subject: Subject, options: Options) -> None:
    subject.require_config("perplexity")
    subject.corpus  # noqa: B018  # data or a tokenizer that do not fit are wrong, not unlucky


SUITE = Suite(
    name="perplexity",
    about="how well held-out text is predicted",
    options=Options,
    measure=measure,
    ready=_ready,
    untrained=lambda options: options,
)


def _chosen(scores: Scores, chosen: Bool[np.ndarray, "N"]) -> Scores:
    parts = {f.name: getattr(scores, f.name)[chosen] for f in dataclasses.fields(Scores)}
    return Scores(**parts)


def _sources(scores: Scores, data: DataConfig) -> tuple[Int[np.ndarray, "N"], Mapping[int, str]]:
    """The source of each scored token, and names of those that have some, without their paths."""
    source = np.zeros_like(scores.document)
    if len(data.sources) > 1:
        source = held_out_sources(data)[scores.document]
    short = [PurePath(name).name or name for name in data.sources]
    twice = len(set(short)) < len(short)
    return source, {n: data.sources[n] if twice else short[n] for n in np.unique(source).tolist()}


def held_out_sources(data: DataConfig) -> Int[np.ndarray, "documents"]:
    """The source of each held-out document, in the corpus's order; reads the sources anew."""
    opened = open_sources(data)
    texts = [(n, source) for n, source in enumerate(opened) if isinstance(source, Collection)]
    owner = {id(document): number for number, source in texts for document in source.documents}
    # A source of one document is cut in two, so that its held-out part is a new document.
    cut = {
        source.documents[0].text: number for number, source in texts if len(source.documents) == 1
    }
    collections = [source for _, source in texts]
    split = split_documents(collections, data.held_out_fraction).held_out if texts else ()
    of_texts = [
        owner[id(document)]
        if id(document) in owner
        else next(number for text, number in cut.items() if text.endswith(document.text))
        for document in split
    ]
    of_shards = [
        number
        for number, source in enumerate(opened)
        if isinstance(source, TokenShards)
        for _ in range(source.index.held_out.documents)
    ]
    return np.array(of_texts + of_shards)


def documents_of(corpus: Corpus, scored: Bool[np.ndarray, "rows T"]) -> Int[np.ndarray, "N"]:
    """The document of each scored token; rows hold the stream of documents from its start on."""
    stream = Stream(corpus.held_out, HELD_OUT_KEY)
    order = stream.order(0)
    ends = np.cumsum(np.diff(corpus.held_out.offsets)[order])
    return order[np.searchsorted(ends, np.flatnonzero(scored), side="right")]


def _context(segments: Int[np.ndarray, "rows T"]) -> Int[np.ndarray, "rows T"]:
    """How many tokens of its own document each position has seen, itself included."""
    place = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return place - np.maximum.accumulate(np.where(begins, place, 0), axis=1) + 1


def _context_bucket(context: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Bucket b holds contexts of 2**b to 2**(b + 1) - 1 tokens."""
    return np.frexp(context)[1] - 1


def _bucket_name(bucket: int) -> str:
    low, high = 1 << bucket, (1 << bucket + 1) - 1
    return str(low) if low == high else f"{low}-{high}"


def _groups(scores: Scores, group: Int[np.ndarray, "N"], name: Callable) -> tuple:
    """A row of each group that has tokens, in the groups' order: its name, tokens, mean nats, their
    interval, documents."""
    rows = []
    for number in np.unique(group).tolist():
        part = value_over(nats_by_document(_chosen(scores, group == number)))
        low, high = part.interval or (None, None)
        tokens = int(np.count_nonzero(group == number))
        rows.append((name(number), tokens, part.mean, low, high, part.n))
    return tuple(rows)


def _context_plot(scores: Scores, unigram_entropy: float) -> Plot:
    middle_of = lambda bucket: math.sqrt((1 << bucket) * ((2 << bucket) - 1))
    rows = _groups(scores, _context_bucket(scores.context), middle_of)
    points = ((x, mean, low, high) for x, _, mean, low, high, _ in rows)
    return Plot(
        name="perplexity_by_context",
        title="Held-out loss by context",
        x_label="tokens of the document before the predicted one",
        y_label="loss (nats per token)",
        curves={"model": tuple(points)},
        baselines={"entropy of single tokens": unigram_entropy},
        log_x=True,
    )
