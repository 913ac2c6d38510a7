"""How a new layer's parameters are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Init:
    """Random numbers, standard deviations and dtype of the parameters of one layer.

    `out_std` is that of matrices whose product is added to the residual stream: each of L layers
    adds to it, so Megatron draws them smaller.
    """

    rngs: nnx.Rngs
    std: float
    out_std: float
    dtype: str = "float32"

    @property
    def out(self) -> "Init":
        """Of matrices whose product is added to the residual stream."""
        return dataclasses.replace(self, std=self.out_std)

    def normal(self, *shape: int, dtype: str | None = None) -> Float[Array, "..."]:
        """N(0, std²), drawn in float32 and then cast."""
        drawn = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return drawn.astype(dtype or self.dtype)
