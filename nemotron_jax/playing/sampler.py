"""Many conversations of one model side by side: each is fed what it reads and writes its turns."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.decoding.sampling import Sampling, distribution, draw
from nemotron_jax.decoding.step import for_decoding, last_hidden, prefill_chunk
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import place_batch

CHUNK = 16  # tokens are fed in multiples of this, so that few programs are compiled


class Conversations(Protocol):
    """What a sampler gives for some prompts: conversations to feed and to go on with."""

    def swap(self, model: Nemotron) -> None: ...

    def read(self, rows: Sequence[Sequence[int]]) -> None: ...

    def write(self, limits: Sequence[int]) -> "list[Written]": ...


# Begins conversations: (model, prompts, copies, *, max_tokens, stop_token, temperature, seed).
Sampler = Callable[..., Conversations]


@dataclasses.dataclass(frozen=True)
class Written:
    """New tokens of one conversation, with the generator's log-probability of each: that of the
    distribution it was drawn from, temperature included."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool  # by the stop token, which is the last


class SideBySide:
    """A fixed number of conversations with a cache of their own each.

    Rows are kept through all turns, so that one program serves every turn; a row that is done
    costs its share of each step all the same. Draws of row r are those of (seed, r, its tokens).
    """

    def __init__(
        self,
        model: Nemotron,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        max_tokens: int,
        stop_token: int,
        temperature: float,
        seed: int,
    ) -> None:
        """`copies` conversations of each prompt, next to each other; a prompt is read once."""
        self._model = for_decoding(model)
        self._stop, self._temperature = stop_token, temperature
        rows = len(prompts) * copies
        keys = jax.random.split(jax.random.key(seed), rows)
        self._keys = place_batch(jax.random.key_data(keys))
        # A row has room for what any other reads, up to a whole conversation, as padding.
        capacity = _round_up(2 * max_tokens + CHUNK, CHUNK)
        cache = jax.jit(lambda: model.init_cache(len(prompts), capacity))()
        hidden = jnp.zeros((len(prompts), model.config.width), model.embedding[...].dtype)
        cache, hidden = self._read(place_batch(cache), place_batch(hidden), prompts)
        repeat = jax.jit(lambda tree: jax.tree.map(lambda a: jnp.repeat(a, copies, axis=0), tree))
        self._cache, self._hidden = repeat((cache, hidden))

    def swap(self, model: Nemotron) -> None:
        """Go on with other weights; caches keep what the old ones made of the tokens so far."""
        self._model = for_decoding(model)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Feed each conversation its tokens, possibly none."""
        if any(rows):
            self._cache, self._hidden = self._read(self._cache, self._hidden, rows)

    def write(self, limits: Sequence[int]) -> list[Written]:
        """Go on with each conversation by at most so many tokens, up to its stop token."""
        limits = np.asarray(limits, np.int32)
        # A power of two: the loop ends where the rows do, whatever it has room for.
        room = 1 << (int(limits.max()) - 1).bit_length() if limits.max() else 1
        self._cache, self._hidden, tokens, logprobs, counts = _write(
            self._model,
            self._cache,
            self._hidden,
            self._keys,
            place_batch(limits),
            Sampling.create(self._temperature),
            stop=self._stop,
            room=room,
        )
        tokens, logprobs, counts = map(np.asarray, (tokens, logprobs, counts))
        assert not np.any(self._cache.overflowed()), "a conversation outgrew its cache"
        out = []
        for row, count in enumerate(counts.tolist()):
            new = tuple(tokens[row, :count].tolist())
            own = tuple(logprobs[row, :count].tolist())
            out.append(Written(new, own, bool(new) and new[-1] == self._stop))
        return out

    def _read(self, cache: Cache, hidden: Array, rows: Sequence[Sequence[int]]) -> tuple:
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), _round_up(int(lengths.max()), CHUNK)), np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        return _feed(self._model, cache, hidden, place_batch(tokens), place_batch(lengths))


@functools.partial(jax.jit, donate_argnums=(1, 2))
def _feed(
    model: Nemotron,
    cache: Cache,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> tuple[Cache, Float[Array, "B D"]]:
    """The cache after a row's tokens, and each row's last hidden state so far."""
    cache, states = prefill_chunk(model, cache, tokens, lengths)
    return cache, jnp.where((lengths > 0)[:, None], last_hidden(states, lengths), hidden)


@functools.partial(jax.jit, static_argnames=("stop", "room"), donate_argnums=(1, 2))
def _write(
    model: Nemotron,
    cache: Cache,
    hidden: Float[Array, "B D"],
    keys: Array,
    limits: Int[Array, "B"],
    sampling: Sampling,
    *,
    stop: int,
    room: int,
) -> tuple:
    """Every row's new tokens, all of them in the cache that comes back."""
    batch = limits.shape[0]
    by_row = jax.random.wrap_key_data(keys)

    def going(carry: tuple) -> Bool[Array, ""]:
        return jnp.any(carry[-1])

    def step(carry: tuple) -> tuple:
        cache, hidden, tokens, logprobs, counts, active = carry
        logits = model.logits(hidden)
        drawn = jax.vmap(jax.random.fold_in)(by_row, cache.length)
        likely = distribution(logits, sampling)
        token = draw(likely, drawn)
        logprob = jnp.take_along_axis(likely, token[:, None], axis=-1)[:, 0]
        here = (jnp.arange(room) == counts[:, None]) & active[:, None]
        tokens = jnp.where(here, token[:, None], tokens)
        logprobs = jnp.where(here, logprob[:, None], logprobs)
        cache, states = prefill_chunk(model, cache, token[:, None], active.astype(jnp.int32))
        hidden = jnp.where(active[:, None], states[:, 0], hidden)
        counts += active
        active &= (token != stop) & (counts < limits)
        return cache, hidden, tokens, logprobs, counts, active

    zeros = lambda dtype: jnp.zeros((batch, room), dtype)
    start = (cache, hidden, zeros(jnp.int32), zeros(jnp.float32), limits * 0, limits > 0)
    return jax.lax.while_loop(going, step, start)[:-1]


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
