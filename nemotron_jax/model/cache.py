"""What decoding remembers: per layer a Mamba-2 state or keys and values, and how many tokens they
hold."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nemotron_jax.config.model import ModelConfig
from nemotron_jax.layers.attention import KVState
from nemotron_jax.layers.mamba2 import MambaState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One state per layer, None where a layer keeps none; `length` counts each row's tokens.

    After a call with `every_state`, `start` holds the lengths before it and Mamba states hold one
    entry a token: `select` brings such a cache back to one state per row.
    """

    layers: tuple
    length: Int[Array, "B"]
    start: Int[Array, "B"] | None = None

    @classmethod
    def zeros(
        cls, config: ModelConfig, pattern: str, batch: int, capacity: int, dtype: str
    ) -> "Cache":
        def state(letter: str) -> KVState | MambaState | None:
            if letter == "*":
                return KVState.zeros(config.attention, batch, capacity, dtype)
            return MambaState.zeros(config.mamba, batch, dtype) if letter == "M" else None

        return cls(tuple(state(letter) for letter in pattern), jnp.zeros(batch, jnp.int32))

    def select(self, count: Int[Array, "B"]) -> "Cache":
        """The cache as it was after the first `count` (at least 1) of the last call's tokens, by
        row."""
        if self.start is None:
            raise ValueError(
                "Cache.select: this cache holds one state per row; "
                "call the model with every_state=True"
            )
        pick = jax.vmap(lambda states, n: states[n - 1])
        layers = tuple(
            jax.tree.map(lambda a: pick(a, count), layer)
            if isinstance(layer, MambaState)
            else layer
            for layer in self.layers
        )
        return Cache(layers, self.start + count)
