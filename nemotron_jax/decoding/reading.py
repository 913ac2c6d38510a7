"""Prompts read in chunks, many rows together, into a cache of their own."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding.step import last_hidden, prefill_chunk
from nemotron_jax.decoding.store import FlatModel
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import place_batch, shard

PREFILL_CHUNK = 1024  # tokens of one prefill call; memory of a long prompt is a chunk's
_SMALLEST_CHUNK = 16  # shorter prompts are padded to it: one program for all of them
# Batches of up to 16 rows are powers of two, and larger ones multiples of 16, so that few programs
# are compiled.
_ROWS_STEP = 16


def prefill(
    model: Nemotron,
    rows: Sequence[Sequence[int]],
    extra: int,
    *,
    mtp: bool = False,
    execution: Execution = Execution(),
) -> tuple[Cache, Float[Array, "B V"]]:
    """A cache that holds every row's prompt and has room for `extra` tokens, and the next token's
    logits."""
    weights, capacity = FlatModel.of(model), padded(max(map(len, rows))) + extra
    cache, hidden = empty_rows(weights, rows=len(rows), capacity=capacity, mtp=mtp)
    cache, hidden = read(weights, cache, hidden, rows, execution=execution)
    return cache, model.logits(hidden, execution=execution)


def read(
    weights: FlatModel,
    cache: Cache,
    hidden: Float[Array, "B D"],
    new: Sequence[Sequence[int]],
    *,
    execution: Execution = Execution(),
    heard: Callable[[int, Array], None] | None = None,
) -> tuple[Cache, Float[Array, "B D"]]:
    """The cache after each row's new tokens, possibly none, and the rows' last hidden states.

    `heard` is called after each chunk with its start and the hidden states of all its tokens.
    """
    lengths = np.array([len(row) for row in new], np.int32)
    longest = int(lengths.max())
    tokens = np.zeros((len(new), padded(longest) if longest else 0), np.int32)
    for row, some in enumerate(new):
        tokens[row, : len(some)] = some
    size = _chunk(longest)
    for start in range(0, tokens.shape[1], size):
        valid = np.clip(lengths - start, 0, size).astype(np.int32)
        piece = place_batch((tokens[:, start : start + size], valid))
        cache, hidden, states = _read_chunk(weights, cache, *piece, hidden, execution=execution)
        # A CPU gives every call in flight temporaries of its own.
        jax.block_until_ready(hidden)
        if heard is not None:
            heard(start, states)
    return cache, hidden


@functools.partial(jax.jit, static_argnames=("rows", "capacity", "mtp"))
def empty_rows(
    weights: FlatModel, *, rows: int, capacity: int, mtp: bool
) -> tuple[Cache, Float[Array, "B D"]]:
    """A cache and hidden states of rows that hold nothing."""
    model = weights.model()
    hidden = jnp.zeros((rows, model.config.width), model.embedding[...].dtype)
    return model.init_cache(rows, capacity, mtp=mtp).shared(), shard(hidden, "batch", None)


@functools.partial(jax.jit, static_argnames="execution", donate_argnums=1)
def _read_chunk(
    weights: FlatModel,
    cache: Cache,
    tokens: Int[Array, "B T"],
    valid: Int[Array, "B"],
    hidden: Float[Array, "B D"],
    *,
    execution: Execution,
) -> tuple[Cache, Float[Array, "B D"], Float[Array, "B T D"]]:
    """The cache after a chunk, each row's last hidden state so far, and those of the chunk."""
    model = weights.model()
    cache, states = prefill_chunk(model, cache, tokens, valid, execution=execution)
    hidden = jnp.where((valid > 0)[:, None], last_hidden(states, valid), hidden)
    return cache.shared(), shard(hidden, "batch", None), states


def rows_of(count: int) -> int:
    """The batch that so many rows are filled up to."""
    return power_of_two(count) if count <= _ROWS_STEP else -(-count // _ROWS_STEP) * _ROWS_STEP


def _chunk(longest: int) -> int:
    """Tokens of one prefill call where the longest row reads so many."""
    return min(PREFILL_CHUNK, max(_SMALLEST_CHUNK, power_of_two(longest)))


def padded(longest: int) -> int:
    """Tokens that rows are filled up to."""
    return -(-longest // _chunk(longest)) * _chunk(longest)


def power_of_two(count: int) -> int:
    """The smallest one that is at least `count`."""
    return 1 << (max(count, 1) - 1).bit_length()
