"""From logits to a token: the distribution that is sampled, and drawing from it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.sharding import parts

_LARGEST = np.iinfo(np.int32).max
# The smallest normal float32: a CPU takes smaller ones for 0, and logits over 0 are no numbers.
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, then min-p, then top-k, then top-p; temperature 0 is greedy, top_k 0, top_p 1
    and min_p 0 keep every token.

    Each value is one for all rows, or one a row. None of them is fixed when compiled.
    """

    temperature: Float[Array, "*B"]
    top_k: Int[Array, "*B"]
    top_p: Float[Array, "*B"]
    min_p: Float[Array, "*B"]

    @classmethod
    def create(
        cls,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
    ) -> "Sampling":
        """Raises ValueError for a value out of range."""
        return cls(*map(jnp.asarray, checked_sampling(temperature, top_k, top_p, min_p)))

    @property
    def greedy(self) -> Bool[Array, "*B"]:
        """Which rows take the likeliest token."""
        return self.temperature < _SMALLEST_TEMPERATURE

    @property
    def filters(self) -> Bool[Array, ""]:
        """Whether any row leaves tokens out."""
        some = jnp.any(self.top_k > 0) | jnp.any(self.top_p < 1)
        return some | jnp.any(self.min_p > 0)


def checked_sampling(
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    min_p: float | Sequence[float] = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """As float32, int32, float32 and float32. Raises ValueError for a value out of range."""
    t, k = _numbers("temperature", temperature), np.asarray(top_k)
    p, least = _numbers("top_p", top_p), _numbers("min_p", min_p)
    if not np.all((t >= 0) & (t < np.inf)):
        raise ValueError(
            f"Sampling: temperature={temperature} must be at least 0, and finite; 0 is greedy"
        )
    if not np.issubdtype(k.dtype, np.integer):
        raise ValueError(f"Sampling: top_k={top_k!r} must be an integer; 0 keeps every token")
    if np.any(k < 0):
        raise ValueError(f"Sampling: top_k={top_k} must be at least 0; 0 keeps every token")
    if not np.all((p > 0) & (p <= 1)):
        raise ValueError(f"Sampling: top_p={top_p} must lie in (0, 1]; 1 keeps every token")
    if not np.all((least >= 0) & (least <= 1)):
        raise ValueError(f"Sampling: min_p={min_p} must lie in [0, 1]; 0 keeps every token")
    t = np.minimum(t, np.finfo(np.float32).max).astype(np.float32)
    k = np.minimum(k.astype(np.float64), _LARGEST).astype(np.int32)  # int8 has no such number
    return t, k, p.astype(np.float32), least.astype(np.float32)


def _numbers(name: str, value: object) -> np.ndarray:
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise ValueError(f"Sampling: {name}={value!r} must be a number, or one for each row")
    return array


def distribution(logits: Float[Array, "B *T V"], sampling: Sampling) -> Float[Array, "B *T V"]:
    """float32 log-probabilities of what is drawn; those of a greedy row are 0 and -inf."""

    def by_row(values: Array) -> Array:
        return values.reshape(*values.shape, *(1,) * (logits.ndim - values.ndim))

    greedy = by_row(sampling.greedy)
    # From the largest down: a small temperature makes large logits infinite, but never these.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(greedy, 1.0, by_row(sampling.temperature))
    least, top_k, top_p = map(by_row, (sampling.min_p, sampling.top_k, sampling.top_p))

    def filtered(scaled: Array) -> Array:
        # The likeliest token's logit is 0 now: log(min_p) is the least that stays.
        kept = jnp.where(scaled >= jnp.log(least), scaled, -jnp.inf)
        return keep_likely(kept, top_k, top_p)

    # Rows come and go where a program is compiled for any: without filters, none sorts.
    scaled = jax.lax.cond(sampling.filters, filtered, lambda scaled: scaled, scaled)
    likeliest = jnp.argmax(logits, axis=-1)[..., None] == jnp.arange(logits.shape[-1])
    certain = jnp.where(likeliest, 0.0, -jnp.inf)
    return jnp.where(greedy, certain, jax.nn.log_softmax(scaled, axis=-1))


def draw(log_probabilities: Float[Array, "B V"], keys: Array) -> Int[Array, "B"]:
    """One token a row; each row draws with its own key."""
    return jax.vmap(jax.random.categorical)(keys, log_probabilities).astype(jnp.int32)


def sample(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, "B"]:
    """One token a row of what `sampling` makes of its logits."""
    return jax.lax.cond(
        jnp.all(sampling.greedy),
        lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        lambda logits: draw(distribution(logits, sampling), keys),
        logits,
    )


def keep_likely(
    logits: Float[Array, "*B V"],
    top_k: Int[Array, "*B 1"] | int,
    top_p: Float[Array, "*B 1"] | float,
) -> Float[Array, "*B V"]:
    """-inf for tokens outside the k likeliest (0: all), then outside the smallest set that holds
    top_p.

    A token that crosses top_p is kept, so one always remains; equal logits stay or go together.
    """
    vocabulary = logits.shape[-1]
    if parts("vocabulary", vocabulary) > 1:
        return _keep_likely_of_parts(logits, top_k, top_p)
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocabulary)
    allowed = jnp.where(top_k > 0, top_k, vocabulary)
    kept = jnp.where(rank < allowed, ordered, -jnp.inf)
    probability = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    inside = (before < top_p) | (top_p >= 1) | (rank == 0)  # sums of float32 may pass 1
    kept = (rank < allowed) & inside
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _keep_likely_of_parts(
    logits: Float[Array, "*B V"],
    top_k: Int[Array, "*B 1"] | int,
    top_p: Float[Array, "*B 1"] | float,
) -> Float[Array, "*B V"]:
    """`keep_likely` of a vocabulary that devices share: they exchange counts and sums of rows, and
    no logits, as an order of all of them would need.

    A token is kept where the tokens above it are fewer than k, and hold less than top_p.
    """
    order = _in_order(logits)
    count = lambda least: jnp.sum(order > least, axis=-1, keepdims=True)
    allowed = jnp.where(top_k > 0, top_k, logits.shape[-1])
    kept = jnp.where(order >= _least(lambda at: count(at) < allowed, order), logits, -jnp.inf)
    probability = jax.nn.softmax(kept, axis=-1)
    above = lambda at: jnp.sum(jnp.where(order > at, probability, 0), axis=-1, keepdims=True)
    least = _least(lambda at: (above(at) < top_p) | (top_p >= 1), order)
    is_best = order == jnp.max(order, axis=-1, keepdims=True)
    return jnp.where((order >= least) | is_best, kept, -jnp.inf)


def _in_order(x: Float[Array, "*B V"]) -> Int[Array, "*B V"]:
    """int32 in the order of floats: those of negative numbers count down."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 is 0
    return jnp.where(bits < 0, bits ^ _LARGEST, bits)


def _least(holds: Callable[[Array], Array], order: Int[Array, "*B V"]) -> Int[Array, "*B 1"]:
    """The least int32 of each row for which `holds` does; it holds for all that are larger.

    By halves: what is known is that it holds at `high`, and not below `low`.
    """

    def half(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down; no sum overflows
        found = holds(middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    fill = lambda value: jnp.full((*order.shape[:-1], 1), value, jnp.int32)
    return jax.lax.fori_loop(0, 32, half, (fill(-_LARGEST - 1), fill(_LARGEST)))[1]
