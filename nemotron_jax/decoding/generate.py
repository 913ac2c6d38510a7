"""Text from a model: chunked prefill, then one compiled loop of rounds."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.config.checks import check_value, is_integer
from nemotron_jax.decoding.loop import Loop, Rules, first_tokens, run_rounds
from nemotron_jax.decoding.sampling import Sampling
from nemotron_jax.decoding.speculative import Acceptance, count_places
from nemotron_jax.decoding.step import for_decoding, last_hidden, prefill_chunk
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron

PREFILL_CHUNK = 1024  # tokens of one prefill call; memory of a long prompt is a chunk's
_SMALLEST_CHUNK = 16
_FEWEST_NEW_TOKENS = 64  # buffers hold this times a power of two, so that few loops are compiled
_STOPS_STEP = 8  # likewise for the table of stop tokens
MOST_DRAFTS = 32  # more were never worth their cost, and every count compiles a loop of its own
MOST_NEW_TOKENS = 2**24  # 16 times the context that the family was trained for
_SEEDS = f"must be an integer from 0 to {2**32 - 1}"


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of each row; what follows a row's stop token is padding."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]  # new tokens of each row, its stop token counted
    logprobs: Float[np.ndarray, "B N"]  # float32 log-softmax of the untempered logits; 0 in padding
    acceptance: Acceptance | None = None  # of drafted tokens; None without speculation


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
    # Those of numpy may overflow in a sum, and compile a program for their type.
    max_new_tokens, speculative = int(max_new_tokens), int(speculative)
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
    cache, states = prefill_chunk(model, cache, tokens, valid)
    return cache, jnp.where((valid > 0)[:, None], last_hidden(states, valid), hidden)


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
) -> Loop:
    """The loop's end; its cache is a result, so that the donated one is written in place."""
    batch, pad = logits.shape[0], model.config.pad_token
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    rules = Rules(sampling, row_keys, stops, limit, pad)
    token, sizes = jnp.zeros(batch, jnp.int32), {"capacity": capacity, "speculative": speculative}
    start = Loop.create(cache, token, ~real, pad=pad, **sizes)
    start = first_tokens(start, logits, jnp.ones(batch, bool), rules)
    return run_rounds(model, start, rules, speculative=speculative)


def _result(end: Loop, rows: int, max_new_tokens: int, speculative: int) -> Generated:
    assert not np.any(end.cache.overflowed()), "a row outgrew its cache"
    counts = count_places(np.asarray(end.places), speculative)
    return Generated(
        tokens=np.asarray(end.tokens)[:rows, :max_new_tokens],
        lengths=np.asarray(end.lengths)[:rows],
        logprobs=np.asarray(end.logprobs)[:rows, :max_new_tokens],
        acceptance=Acceptance.of_places(counts) if speculative else None,
    )


def _checked_rows(model: Nemotron, prompt_tokens: Sequence, max_new_tokens: int) -> list[list[int]]:
    if not np.iterable(prompt_tokens):
        raise ValueError(
            f"generate: prompt_tokens={prompt_tokens!r} must be rows of tokens, as in [[1, 17]]"
        )
    rows = [np.asarray(row).tolist() for row in prompt_tokens]
    vocabulary = model.config.vocab_size
    if not is_integer(max_new_tokens) or not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        raise ValueError(
            f"generate: max_new_tokens={max_new_tokens!r} must be an integer from 1 to "
            f"{MOST_NEW_TOKENS}"
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
