"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p; temperature 0 is greedy, top_k 0 and top_p 1 keep every
    token.

    Which filters run is fixed when compiled; their values are not.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> "Sampling":
        if not temperature >= 0:
            raise ValueError(f"Sampling: temperature={temperature} must be at least 0; 0 is greedy")
        if top_k < 0:
            raise ValueError(f"Sampling: top_k={top_k} must be at least 0; 0 keeps every token")
        if not 0 < top_p <= 1:
            raise ValueError(f"Sampling: top_p={top_p} must lie in (0, 1]; 1 keeps every token")
        return cls(
            jnp.float32(temperature),
            jnp.int32(top_k),
            jnp.float32(top_p),
            greedy=temperature == 0,
            filtered=top_k > 0 or top_p < 1,
        )


def sample(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, "B"]:
    """One token a row; each row draws with its own key."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.filtered:
        logits = keep_likely(logits, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(
    logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B V"]:
    """-inf for tokens outside the k likeliest (0: all), then outside the smallest set that holds
    top_p.

    A token that crosses top_p is kept, so one always remains; equal logits stay or go together.
    """
    vocabulary = logits.shape[-1]
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
