"""A vocabulary that devices share: what each does with its part of it, inside `local`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nemotron_jax.sharding.weights import Cuts
from nemotron_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """One device's part of a vocabulary, cut along `names`; all of it where there are none.

    What is the same on all devices that share it is told so by sums and maxima over them.
    """

    names: tuple[str, ...] = ()

    @staticmethod
    def of(cuts: Cuts, axis: int) -> "Vocabulary":
        """Of a table whose tokens lie along `axis`."""
        return Vocabulary(cuts.along(axis))

    def look_up(self, table: Float[Array, "v D"], tokens: Int[Array, "..."]) -> Array:
        """The tokens' rows of the whole table."""
        if not self.names:
            return table[tokens]
        own, mine = self._own(tokens, table.shape[0])
        return jax.lax.psum(jnp.where(mine[..., None], table[own], 0), self.names)

    def of_tokens(self, values: Float[Array, "N v"], tokens: Int[Array, "N"]) -> Array:
        """Each row's value of its token, [N, 1]."""
        if not self.names:
            return jnp.take_along_axis(values, tokens[:, None], axis=-1)
        own, mine = self._own(tokens[:, None], values.shape[-1])
        return self.sum(jnp.where(mine, jnp.take_along_axis(values, own, axis=-1), 0))

    def is_token(self, tokens: Int[Array, "N"], size: int) -> Bool[Array, "N v"]:
        """Which of this part's `size` tokens is each row's."""
        return self._first(size) + jnp.arange(size) == tokens[:, None]

    def sum(self, values: Array) -> Array:
        """Over all parts."""
        return jax.lax.psum(values, self.names) if self.names else values

    def max(self, values: Array) -> Array:
        """Over all parts; without a gradient where there are several."""
        if not self.names:
            return values
        return jax.lax.pmax(jax.lax.stop_gradient(values), self.names)

    def _first(self, size: int) -> Array | int:
        return jax.lax.axis_index(self.names) * size if self.names else 0

    def _own(self, tokens: Array, size: int) -> tuple[Array, Array]:
        """The tokens counted from this part's first, and which of them it has; others are 0."""
        own = tokens - self._first(size)
        mine = (own >= 0) & (own < size)
        return jnp.where(mine, own, 0), mine
