"""Text from a model: chunked prefill, then one compiled loop of single tokens."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.decoding.sampling import Sampling, sample
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron

PREFILL_CHUNK = 1024  # tokens of one prefill call; memory of a long prompt is a chunk's
_SMALLEST_CHUNK = 16
_NEW_TOKENS_STEP = 64  # buffers grow by this many tokens, so that few loops are ever compiled
_STOPS_STEP = 8  # likewise for the table of stop tokens


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of each row; what follows a row's stop token is padding."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]  # new tokens of each row, its stop token counted
    logprobs: Float[np.ndarray, "B N"]  # float32 log-softmax of the untempered logits; 0 in padding
    acceptance: None = None  # of drafted tokens; there are none without speculation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """What the decode loop carries."""

    step: Int[Array, ""]
    cache: Cache
    logits: Float[Array, "B V"]  # of each row's next token
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    lengths: Int[Array, "B"]
    done: Array


def generate(
    model: Nemotron,
    prompt_tokens: Int[Array, "B T"] | Sequence[Sequence[int]],
    max_new_tokens: int = 24,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = (),
    speculative: int = 0,
    seed: int = 0,
) -> Generated:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Rows may differ in length; each behaves as if it were alone. `stop_tokens=None` takes the
    checkpoint's own end-of-sequence ids, `()` never stops. Raises ValueError for an empty prompt, a
    token outside the vocabulary, or sampling values out of range.
    """
    rows = _checked_rows(model, prompt_tokens, max_new_tokens, speculative)
    sampling = Sampling.create(temperature, top_k, top_p)
    if stop_tokens is None:
        stop_tokens = default_stop_tokens(model)
    capacity = _round_up(max_new_tokens, _NEW_TOKENS_STEP)
    cache, logits = prefill(model, rows, extra=capacity)
    end = _decode(
        model,
        cache,
        logits,
        sampling,
        stops=_stop_table(stop_tokens),
        key=jax.random.key(seed),
        limit=max_new_tokens,
        capacity=capacity,
    )
    return Generated(
        tokens=np.asarray(end.tokens)[:, :max_new_tokens],
        lengths=np.asarray(end.lengths),
        logprobs=np.asarray(end.logprobs)[:, :max_new_tokens],
    )


def default_stop_tokens(model: Nemotron) -> tuple[int, ...]:
    """The end-of-sequence ids of the checkpoint's generation_config, or else the config's."""
    if model.origin is not None and model.origin.stop_tokens:
        return model.origin.stop_tokens
    return (model.config.eos_token,)


def prefill(
    model: Nemotron, rows: Sequence[Sequence[int]], extra: int
) -> tuple[Cache, Float[Array, "B V"]]:
    """A cache that holds every row's prompt and has room for `extra` tokens, and the next token's
    logits."""
    lengths = np.array([len(row) for row in rows], np.int32)
    chunk = min(PREFILL_CHUNK, max(_SMALLEST_CHUNK, 1 << int(lengths.max() - 1).bit_length()))
    padded = np.zeros((len(rows), _round_up(int(lengths.max()), chunk)), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    cache = model.init_cache(len(rows), padded.shape[1] + extra)
    hidden = jnp.zeros((len(rows), model.config.width), model.embedding[...].dtype)
    for start in range(0, padded.shape[1], chunk):
        valid = np.clip(lengths - start, 0, chunk).astype(np.int32)
        cache, hidden = _prefill_chunk(
            model, cache, padded[:, start : start + chunk], valid, hidden
        )
        # A CPU gives every call in flight temporaries of its own.
        jax.block_until_ready(hidden)
    return cache, model.logits(hidden)


@functools.partial(jax.jit, donate_argnums=1)
def _prefill_chunk(
    model: Nemotron, cache: Cache, tokens: Array, valid: Array, hidden: Array
) -> tuple[Cache, Array]:
    """The cache after a chunk, and each row's last hidden state so far."""
    output = model(tokens, cache=cache, lengths=valid)
    last = jnp.take_along_axis(output.hidden, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)
    return output.cache, jnp.where((valid > 0)[:, None], last[:, 0], hidden)


@functools.partial(jax.jit, static_argnames=("capacity",), donate_argnums=1)
def _decode(
    model: Nemotron,
    cache: Cache,
    logits: Array,
    sampling: Sampling,
    *,
    stops: Array,
    key: Array,
    limit: Array,
    capacity: int,
) -> _Loop:
    """The loop's end; its cache is a result, so that the donated one is written in place."""
    model = model.split_layers()
    batch = logits.shape[0]
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def unfinished(loop: _Loop) -> Array:
        return (loop.step < limit) & ~jnp.all(loop.done)

    def emit(loop: _Loop) -> _Loop:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, loop.step)
        token = jnp.where(loop.done, model.config.pad_token, sample(loop.logits, keys, sampling))
        chosen = jnp.take_along_axis(loop.logits, token[:, None], axis=-1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(loop.logits, axis=-1)
        output = model(token[:, None], cache=loop.cache)
        return _Loop(
            step=loop.step + 1,
            cache=output.cache,
            logits=model.logits(output.hidden[:, 0]),
            tokens=jax.lax.dynamic_update_slice(loop.tokens, token[:, None], (0, loop.step)),
            logprobs=jax.lax.dynamic_update_slice(
                loop.logprobs, jnp.where(loop.done, 0.0, logprob)[:, None], (0, loop.step)
            ),
            lengths=loop.lengths + ~loop.done,
            done=loop.done | jnp.any(token[:, None] == stops, axis=-1),
        )

    start = _Loop(
        step=jnp.int32(0),
        cache=cache,
        logits=logits,
        tokens=jnp.full((batch, capacity), model.config.pad_token, jnp.int32),
        logprobs=jnp.zeros((batch, capacity), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
    )
    return jax.lax.while_loop(unfinished, emit, start)


def _checked_rows(
    model: Nemotron, prompt_tokens: Sequence, max_new_tokens: int, speculative: int
) -> list[list[int]]:
    rows = [np.asarray(row).tolist() for row in prompt_tokens]
    vocabulary = model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be at least 1")
    if speculative != 0:
        raise ValueError(f"generate: speculative={speculative} is not available; use 0")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(token, int) for token in row):
            raise ValueError(
                f"generate: prompt {number} is {row!r}; each prompt is a row of integer tokens"
            )
    if not rows or not all(rows):
        raise ValueError(
            "generate: every prompt needs at least one token; begin with the bos token"
        )
    for number, row in enumerate(rows):
        outside = [token for token in row if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(
                f"generate: prompt {number} holds token {outside[0]}, outside the model's "
                f"vocabulary of {vocabulary}; was it encoded with this model's tokenizer?"
            )
    return rows


def _stop_table(stop_tokens: Sequence[int]) -> Int[np.ndarray, "stops"]:
    """The stop tokens and at least one -1, which no token equals; its size hardly ever changes."""
    table = np.full(_round_up(len(stop_tokens) + 1, _STOPS_STEP), -1, np.int32)
    table[: len(stop_tokens)] = stop_tokens
    return table


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
