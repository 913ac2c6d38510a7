"""Loss on text that training never saw, in nats per token and in bits per byte."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.corpus import Corpus, unigram_entropy
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import on_every_device
from nemotron_jax.training.losses import token_nll
from nemotron_jax.types import Batch

# A finished run is evaluated on all of its held-out text where that is no more than this: some
# minutes on a CPU. eval.py evaluates on all of it, however much.
MOST_TOKENS_AT_END = 2_000_000


def held_out_probe(
    corpus: Corpus, data: DataConfig, rows: int, chunk: int
) -> Callable[[Nemotron, Execution], dict[str, float]]:
    """A function of a model and how to run it: `held_out_loss` (nats per token) and `bits_per_byte`
    of held-out rows, beside the `unigram_entropy` of those rows' tokens.

    `gzip_bits_per_byte` is that of all held-out text: gzip needs more than a few rows. Bits per
    byte compare models with different tokenizers; the end of a document is scored as a token and
    spells no byte.
    """
    batches = held_out_batches(corpus, data, 0, rows)
    entropy = _entropy_of(corpus, batches)

    def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
        nats, tokens = held_out_nats(model, batches, chunk=chunk, execution=execution)
        return {
            "held_out_loss": nats / tokens,
            "bits_per_byte": nats / math.log(2) / _bytes_of(corpus, batches),
            "unigram_entropy": entropy,
            "gzip_bits_per_byte": corpus.facts.gzip_bits_per_byte,
        }

    return evaluate


def whole_probe(
    corpus: Corpus, data: DataConfig, chunk: int
) -> Callable[[Nemotron, Execution], dict[str, float]] | None:
    """`held_out_probe` of all held-out text, which eval.py's perplexity reports too.

    None where that is more than MOST_TOKENS_AT_END tokens.
    """
    if len(corpus.held_out.tokens) > MOST_TOKENS_AT_END:
        return None
    return held_out_probe(corpus, data, max(1, held_out_row_count(corpus, data)), chunk)


def _bytes_of(corpus: Corpus, batches: Sequence[Batch]) -> int:
    return int(sum(corpus.bytes_of(batch).sum() for batch in batches))


def _entropy_of(corpus: Corpus, batches: Sequence[Batch]) -> float:
    """Mean nats of the batches' tokens under the smoothed frequencies of the training text."""
    tokens = np.concatenate([batch.tokens[np.asarray(batch.segment_ids) > 0] for batch in batches])
    if len(tokens) >= len(corpus.held_out.tokens):
        return corpus.facts.unigram_entropy
    size = len(corpus.byte_lengths)
    counts = sum(documents.counts(size) for documents in corpus.train)
    return unigram_entropy(counts, tokens)


def learned_probe(
    batches: Sequence[Batch], chunk: int
) -> Callable[[Nemotron, Execution], dict[str, float]]:
    """A function of a model and how to run it: `held_out_loss`, nats per learned token."""

    def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
        nats, tokens = held_out_nats(model, batches, chunk=chunk, execution=execution)
        return {"held_out_loss": nats / tokens}

    return evaluate


def held_out_nats(
    model: Nemotron,
    batches: Sequence[Batch],
    *,
    chunk: int = 512,
    execution: Execution = Execution(),
) -> tuple[float, int]:
    """Summed next-token cross entropy of the batches in nats, and the number of scored tokens."""
    score = functools.partial(token_nats, model, chunk=chunk, execution=execution)
    nats = sum(float(np.sum(score(batch), dtype=np.float64)) for batch in batches)
    tokens = int(sum(np.count_nonzero(batch.weights[..., 0]) for batch in batches))
    if tokens == 0:
        raise ValueError("held_out_nats: the batches score no token; give more held-out text")
    return nats, tokens


def token_nats(
    model: Nemotron, batch: Batch, *, chunk: int = 512, execution: Execution = Execution()
) -> Float[np.ndarray, "B T"]:
    """Cross entropy of each token's next one, in nats; 0 where the batch scores none.

    Never holds the logits of more than `chunk` tokens; float32.
    """
    return np.asarray(_token_nats(model, batch, chunk=chunk, execution=execution))


@functools.partial(jax.jit, static_argnames=("chunk", "execution"))
def _token_nats(model: Nemotron, batch: Batch, *, chunk: int, execution: Execution) -> Array:
    output = model(batch.tokens, segment_ids=batch.segment_ids, execution=execution)
    nats = token_nll(output.hidden, model.head.matrix(), batch.targets[..., 0], chunk)
    return on_every_device(jnp.where(batch.weights[..., 0] > 0, nats, 0.0))
