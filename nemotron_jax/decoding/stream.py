"""One conversation's next tokens, each as soon as it is chosen."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nemotron_jax.decoding.sampling import Sampling, sample
from nemotron_jax.model.nemotron import Nemotron

PREFILL_CHUNK = 256  # tokens of one prefill call; every prompt is cut in these, so one is compiled
# Caches grow by this many tokens: a conversation that gets longer seldom compiles a new step.
CAPACITY_STEP = 2048


def stream_tokens(
    model: Nemotron,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    seed: int = 0,
    budget: int | None = None,
    budget_token: int = -1,
) -> Iterator[int]:
    """Up to `max_new_tokens` ids that go on from a prompt, a stop token given and then the last.

    After `budget` tokens without a `budget_token` that one is put in place of what was drawn: it
    ends the reasoning. Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    outside = [token for token in prompt if not 0 <= token < model.config.vocab_size]
    if not prompt or outside:
        raise ValueError(
            f"stream_tokens: the prompt of {len(prompt)} tokens is empty or holds ids outside the "
            f"vocabulary of {model.config.vocab_size}: {outside[:3]}"
        )
    cache, hidden = _read(model, prompt, max_new_tokens)
    key, stops = jax.random.key(seed), frozenset(stop_tokens)
    open_budget = budget
    for step in range(max_new_tokens):
        token = int(_choose(model, hidden, jax.random.fold_in(key, step), sampling)[0])
        if token == budget_token:
            open_budget = None
        elif open_budget is not None and step >= open_budget:
            token, open_budget = budget_token, None
        yield token
        if token in stops:
            return
        cache, hidden = _advance(model, cache, jnp.full((1, 1), token, jnp.int32), None)


def _read(model: Nemotron, prompt: Sequence[int], extra: int) -> tuple[Any, Array]:
    """A cache that holds the prompt, and its last hidden state."""
    whole = -(-len(prompt) // PREFILL_CHUNK) * PREFILL_CHUNK
    cache = model.init_cache(1, -(-(whole + extra) // CAPACITY_STEP) * CAPACITY_STEP)
    padded = np.zeros((1, whole), np.int32)
    padded[0, : len(prompt)] = prompt
    for start in range(0, whole, PREFILL_CHUNK):
        valid = np.array([min(len(prompt) - start, PREFILL_CHUNK)], np.int32)
        part = padded[:, start : start + PREFILL_CHUNK]
        cache, hidden = _advance(model, cache, jnp.asarray(part), jnp.asarray(valid))
    return cache, hidden


@functools.partial(jax.jit, donate_argnums=1)
def _advance(model: Nemotron, cache: Any, tokens: Array, valid: Array | None) -> tuple[Any, Array]:
    output = model(tokens, cache=cache, lengths=valid)
    last = tokens.shape[1] - 1 if valid is None else valid[0] - 1
    return output.cache, output.hidden[:, last]


@jax.jit
def _choose(model: Nemotron, hidden: Array, key: Array, sampling: Sampling) -> Array:
    return sample(model.logits(hidden), key[None], sampling)
