"""How well a model predicts held-out text: per token and per byte, by context and by source."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.corpus import Corpus
from nemotron_jax.data.held_out import split_documents
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.data.opened import open_sources
from nemotron_jax.data.packing import HELD_OUT_KEY, Stream
from nemotron_jax.data.shards import TokenShards
from nemotron_jax.data.sources import Collection
from nemotron_jax.evaluation.evaluator import Plot, Result, Subject, Table
from nemotron_jax.evaluation.held_out import token_nats
from nemotron_jax.model.nemotron import Nemotron


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry for each scored token of the held-out text, each of which is scored once."""

    nats: Float[np.ndarray, "N"]
    bytes: Int[np.ndarray, "N"]  # that the token spells
    context: Int[np.ndarray, "N"]  # tokens of its document that the model saw before it
    document: Int[np.ndarray, "N"]  # its place in the corpus's held-out documents


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The whole held-out text in the rows that training evaluates on.

    Every token with a predecessor in its document is scored once, the end of a document included;
    what lies further back than the row's start is not seen. Standard errors take documents as the
    independent things, because tokens of one document are alike.
    """

    corpus: Corpus
    data: DataConfig
    chunk: int = 512
    execution: Execution = Execution()
    name: str = "perplexity"

    def run(self, model: Nemotron) -> Result:
        """Values `nats_per_token` and `bits_per_byte`, and what they are read against."""
        scores = self.score(model)
        nats, error = ratio_over_documents(scores.nats, np.ones_like(scores.nats), scores.document)
        bits, bits_error = ratio_over_documents(
            scores.nats / math.log(2), scores.bytes, scores.document
        )
        facts = self.corpus.facts
        by_context = _groups(scores.nats, _context_bucket(scores.context), _bucket_name)
        return Result(
            values={
                "nats_per_token": nats,
                "perplexity": math.exp(nats),
                "bits_per_byte": bits,
                "scored_tokens": len(scores.nats),
                "scored_bytes": int(scores.bytes.sum()),
                "unigram_entropy": facts.unigram_entropy,
                "gzip_bits_per_byte": facts.gzip_bits_per_byte,
            },
            n=len(np.unique(scores.document)),
            counted="held-out documents",
            standard_errors={"nats_per_token": error, "bits_per_byte": bits_error},
            tables=(
                Table("By context", ("tokens before", "tokens", "nats per token"), by_context),
                self._by_source(scores),
            ),
            plots=(_context_plot(scores, facts.unigram_entropy),),
        )

    def score(self, model: Nemotron) -> Scores:
        """Each held-out token's cross entropy, and what groups it."""
        rows = held_out_row_count(self.corpus, self.data)
        batches = held_out_batches(self.corpus, self.data, 0, rows)
        nats = functools.partial(token_nats, model, chunk=self.chunk, execution=self.execution)
        segments = np.concatenate([batch.segment_ids for batch in batches])
        targets = np.concatenate([batch.targets[..., 0] for batch in batches])
        scored = np.concatenate([batch.weights[..., 0] for batch in batches]) > 0
        each = np.concatenate([nats(batch) for batch in batches]).astype(np.float64)
        return Scores(
            nats=each[scored],
            bytes=self.corpus.byte_lengths[targets[scored]].astype(np.int64),
            context=_context(segments)[scored],
            document=_documents(self.corpus, scored),
        )

    def _by_source(self, scores: Scores) -> Table:
        source = np.zeros_like(scores.document)
        if len(self.data.sources) > 1:
            source = held_out_sources(self.data)[scores.document]
        rows = _groups(scores.nats, source, lambda number: self.data.sources[number])
        return Table("By source", ("source", "tokens", "nats per token"), rows)


def make(subject: Subject) -> Perplexity:
    """The suite on the subject's held-out text."""
    config = subject.require_config("perplexity")
    return Perplexity(subject.corpus, config.data, config.training.loss_chunk, config.execution)


def ratio_over_documents(
    amount: Float[np.ndarray, "N"], size: Float[np.ndarray, "N"], document: Int[np.ndarray, "N"]
) -> tuple[float, float]:
    """Sum of `amount` over sum of `size`, and its standard error with documents as the sample.

    The error of a ratio of means by linearisation (Cochran, Sampling Techniques, section 6.5); not
    a number for a single document.
    """
    amounts, sizes = np.bincount(document, amount), np.bincount(document, size)
    present = np.bincount(document) > 0
    count, total = int(present.sum()), float(sizes.sum())
    ratio = float(amounts.sum()) / total
    if count < 2:
        return ratio, math.nan
    residuals = (amounts - ratio * sizes)[present]
    return ratio, math.sqrt(count / (count - 1) * float(residuals @ residuals)) / total


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


def _documents(corpus: Corpus, scored: Bool[np.ndarray, "rows T"]) -> Int[np.ndarray, "N"]:
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


def _groups(nats: Float[np.ndarray, "N"], group: Int[np.ndarray, "N"], name) -> tuple:
    """(name, tokens, mean nats) of every group that has tokens, in the groups' order."""
    tokens, sums = np.bincount(group), np.bincount(group, nats)
    return tuple(
        (name(int(number)), int(tokens[number]), float(sums[number] / tokens[number]))
        for number in np.flatnonzero(tokens)
    )


def _context_plot(scores: Scores, unigram_entropy: float) -> Plot:
    middle_of = lambda bucket: math.sqrt((1 << bucket) * ((2 << bucket) - 1))
    groups: Sequence = _groups(scores.nats, _context_bucket(scores.context), middle_of)
    return Plot(
        name="perplexity_by_context",
        title="Held-out loss by context",
        x_label="tokens of the document before the predicted one",
        y_label="loss (nats per token)",
        curves={"model": tuple((middle, mean) for middle, _, mean in groups)},
        baselines={"entropy of single tokens": unigram_entropy},
        log_x=True,
    )
