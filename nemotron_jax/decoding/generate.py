"""Text from a model: chunked prefill, then one compiled loop of rounds."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.config.checks import check_value, is_integer
from nemotron_jax.decoding.sampling import Sampling, sample
from nemotron_jax.decoding.speculative import (
    DRAW,
    Acceptance,
    finish_round,
    keys_at,
    run_round,
)
from nemotron_jax.decoding.step import for_decoding, prefill_chunk
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron

PREFILL_CHUNK = 1024  # tokens of one prefill call; memory of a long prompt is a chunk's
_SMALLEST_CHUNK = 16
_FEWEST_NEW_TOKENS = 64  # buffers hold this times a power of two, so that few loops are compiled
_STOPS_STEP = 8  # likewise for the table of stop tokens
MOST_DRAFTS = 32  # more were never worth their cost, and every count compiles a loop of its own
_SEEDS = f"must be an integer from 0 to {2**32 - 1}"


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of each row; what follows a row's stop token is padding."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]  # new tokens of each row, its stop token counted
    logprobs: Float[np.ndarray, "B N"]  # float32 log-softmax of the untempered logits; 0 in padding
    acceptance: Acceptance | None = None  # of drafted tokens; None without speculation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """What the decode loop carries. Each row's newest token is in `tokens`, not in the cache."""

    cache: Cache
    token: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    lengths: Int[Array, "B"]
    done: Array
    verifications: Int[Array, ""]
    accepted: Int[Array, "k"]  # drafts at each place


def generate(
    model: Nemotron,
    prompt_tokens: Int[Array, "B T"] | Sequence[Sequence[int]],
    max_new_tokens: int = 24,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    stop_tokens: Sequence[int] | int | None = (),
    speculative: int = 0,
    seed: int = 0,
) -> Generated:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Rows may differ in length and in how they are sampled; each behaves as if it were alone.
    `stop_tokens=None` takes the checkpoint's own end-of-sequence ids, `()` never stops.
    `speculative=k` drafts k tokens at a time with the MTP block and verifies them together: greedy
    tokens stay the same, sampled ones keep their distribution. For many calls pass
    `for_decoding(model)`, which is made here otherwise. Raises ValueError for an empty prompt, a
    token outside the vocabulary, drafts without an MTP block, or values of the wrong kind or out of
    range.
    """
    rows = _checked_rows(model, prompt_tokens, max_new_tokens)
    _check_speculative(model, speculative)
    sampling = _sampling_of_rows(Sampling.create(temperature, top_k, top_p), len(rows))
    stop_tokens = default_stop_tokens(model) if stop_tokens is None else stop_tokens
    stops = _stop_table(_checked_stops(model, stop_tokens))
    check_value("generate", "seed", seed, is_integer(seed) and 0 <= seed < 2**32, _SEEDS)
    model = for_decoding(model)
    batch = _power_of_two(len(rows))
    padded = [*rows, *[[0]] * (batch - len(rows))]
    capacity = max(_FEWEST_NEW_TOKENS, _power_of_two(max_new_tokens))
    cache, logits = prefill(model, padded, extra=capacity + speculative + 1, mtp=speculative > 0)
    end = _decode(
        model,
        cache,
        logits,
        sampling,
        stops=stops,
        key=jax.random.key(seed),
        limit=max_new_tokens,
        real=np.arange(batch) < len(rows),
        capacity=capacity,
        speculative=speculative,
    )
    return _result(end, len(rows), max_new_tokens, speculative)


def default_stop_tokens(model: Nemotron) -> tuple[int, ...]:
    """The end-of-sequence ids of the checkpoint's generation_config, or else the config's."""
    if model.origin is not None and model.origin.stop_tokens:
        return model.origin.stop_tokens
    return (model.config.eos_token,)


def prefill(
    model: Nemotron, rows: Sequence[Sequence[int]], extra: int, *, mtp: bool = False
) -> tuple[Cache, Float[Array, "B V"]]:
    """A cache that holds every row's prompt and has room for `extra` tokens, and the next token's
    logits."""
    lengths = np.array([len(row) for row in rows], np.int32)
    chunk = min(PREFILL_CHUNK, max(_SMALLEST_CHUNK, _power_of_two(int(lengths.max()))))
    padded = np.zeros((len(rows), _round_up(int(lengths.max()), chunk)), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    cache = model.init_cache(len(rows), padded.shape[1] + extra, mtp=mtp)
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
    cache, last = prefill_chunk(model, cache, tokens, valid)
    return cache, jnp.where((valid > 0)[:, None], last, hidden)


@functools.partial(jax.jit, static_argnames=("capacity", "speculative"), donate_argnums=1)
def _decode(
    model: Nemotron,
    cache: Cache,
    logits: Array,
    sampling: Sampling,
    *,
    stops: Array,
    key: Array,
    limit: Array,
    real: Array,
    capacity: int,
    speculative: int,
) -> _Loop:
    """The loop's end; its cache is a result, so that the donated one is written in place."""
    batch = logits.shape[0]
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    token = sample(logits, keys_at(row_keys, cache.length, DRAW), sampling)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    logprob = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    empty = _Loop(
        cache=cache,
        token=token,
        # Room for a last round's tokens past the limit, which are not kept.
        tokens=jnp.full((batch, capacity + speculative + 1), model.config.pad_token, jnp.int32),
        logprobs=jnp.zeros((batch, capacity + speculative + 1), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=~real,
        verifications=jnp.int32(0),
        accepted=jnp.zeros(speculative, jnp.int32),
    )
    emit = functools.partial(_emit, stops=stops, limit=limit, pad=model.config.pad_token)
    start = emit(empty, token[:, None], logprob, jnp.ones_like(token))

    def run(loop: _Loop) -> _Loop:
        options = {"sampling": sampling, "row_keys": row_keys}
        round = run_round(model, loop.cache, loop.token, speculative, **options)
        stood = jnp.arange(speculative) < round.accepted[:, None]
        active = ~loop.done
        loop = dataclasses.replace(
            emit(loop, round.tokens, round.logprobs, round.accepted + 1),
            token=jnp.take_along_axis(round.tokens, round.accepted[:, None], axis=1)[:, 0],
            verifications=loop.verifications + jnp.sum(active),
            accepted=loop.accepted + jnp.sum(stood & active[:, None], axis=0),
        )
        # A row that this round has finished grows no more: the others may go on for long.
        return dataclasses.replace(loop, cache=finish_round(model, round, ~loop.done))

    return jax.lax.while_loop(lambda loop: ~jnp.all(loop.done), run, start)


def _emit(
    loop: _Loop,
    tokens: Int[Array, "B n"],
    logprobs: Float[Array, "B n"],
    count: Int[Array, "B"],
    *,
    stops: Array,
    limit: Array,
    pad: int,
) -> _Loop:
    """Rows with the first `count` tokens added, up to a stop token and to the limit."""
    stop = jnp.any(tokens[..., None] == stops, axis=-1)
    # The place of a row's first stop token, or one that no count reaches.
    first = jnp.where(jnp.any(stop, axis=1), jnp.argmax(stop, axis=1), tokens.shape[1])
    room = jnp.where(loop.done, 0, limit - loop.lengths)
    kept = jnp.minimum(jnp.minimum(count, first + 1), room)
    inside = jnp.arange(tokens.shape[1]) < kept[:, None]
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    lengths = loop.lengths + kept
    return dataclasses.replace(
        loop,
        tokens=write(loop.tokens, jnp.where(inside, tokens, pad), loop.lengths),
        logprobs=write(loop.logprobs, jnp.where(inside, logprobs, 0.0), loop.lengths),
        lengths=lengths,
        done=loop.done | (lengths >= limit) | (first < kept),
    )


def _result(end: _Loop, rows: int, max_new_tokens: int, speculative: int) -> Generated:
    assert not np.any(end.cache.overflowed()), "a row outgrew its cache"
    counts = int(end.verifications), np.asarray(end.accepted)
    return Generated(
        tokens=np.asarray(end.tokens)[:rows, :max_new_tokens],
        lengths=np.asarray(end.lengths)[:rows],
        logprobs=np.asarray(end.logprobs)[:rows, :max_new_tokens],
        acceptance=Acceptance.of_counts(*counts) if speculative else None,
    )


def _checked_rows(model: Nemotron, prompt_tokens: Sequence, max_new_tokens: int) -> list[list[int]]:
    if not np.iterable(prompt_tokens):
        raise ValueError(
            f"generate: prompt_tokens={prompt_tokens!r} must be rows of tokens, as in [[1, 17]]"
        )
    rows = [np.asarray(row).tolist() for row in prompt_tokens]
    vocabulary = model.config.vocab_size
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(
            f"generate: max_new_tokens={max_new_tokens!r} must be an integer and at least 1"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(type(token) is int for token in row):
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


def _check_speculative(model: Nemotron, speculative: int) -> None:
    if not is_integer(speculative) or not 0 <= speculative <= MOST_DRAFTS:
        raise ValueError(
            f"generate: speculative={speculative!r} must be an integer between 0 and "
            f"{MOST_DRAFTS}; it is the number of tokens drafted at a time"
        )
    if speculative and model.mtp_block is None:
        raise ValueError(
            f"generate: speculative={speculative} needs an MTP block to draft with, and this model "
            "has none; use 0"
        )


def _sampling_of_rows(sampling: Sampling, rows: int) -> Sampling:
    """One value a row; rows that fill the batch up repeat the last."""

    def by_row(name: str, values: Array) -> Array:
        if values.ndim > 1 or values.size not in (1, rows):
            raise ValueError(
                f"generate: {name} has {values.size} values for {rows} prompts; give one, or one "
                "for each"
            )
        return jnp.pad(jnp.broadcast_to(values, rows), (0, _power_of_two(rows) - rows), mode="edge")

    fields = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
    return dataclasses.replace(sampling, **{n: by_row(n, v) for n, v in fields.items()})


def _checked_stops(model: Nemotron, stop_tokens: Sequence[int] | int) -> Sequence[int]:
    """Every stop token is one that the model can emit."""
    stops = np.atleast_1d(np.asarray(stop_tokens)).tolist()
    if not all(map(is_integer, stops)):
        raise ValueError(
            f"generate: stop_tokens={stop_tokens!r} must be token ids, as in (2, 11); None takes "
            "the checkpoint's own, () never stops"
        )
    vocabulary = model.config.vocab_size
    for token in stops:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"generate: stop_tokens={stop_tokens} holds {token}, outside the model's "
                f"vocabulary of {vocabulary}; no text would ever stop there"
            )
    return stops


def _stop_table(stop_tokens: Sequence[int]) -> Int[np.ndarray, "stops"]:
    """The stop tokens and at least one -1, which no token equals; its size hardly ever changes."""
    table = np.full(_round_up(len(stop_tokens) + 1, _STOPS_STEP), -1, np.int32)
    table[: len(stop_tokens)] = stop_tokens
    return table


def _power_of_two(count: int) -> int:
    """The smallest one that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
