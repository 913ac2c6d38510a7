"""The low-rank change of a matrix, as its module carries it."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.types import Axes, Weight


class Adapter(nnx.Param):
    """A factor of an adapter: its type tells what a run of adapters moves."""


class LowRank(nnx.Module):
    """`scale · a b`, what an adapter adds to a matrix; `a` is None where a neighbour's serves."""

    def __init__(
        self,
        a: Float[Array, "... In R"] | None,
        b: Float[Array, "... R Out"],
        axes: Axes,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        """`axes` are those of the matrix; leading ones are shared by both factors. `dropout` is the
        share of inputs that training leaves out."""
        *leading, rows, columns = axes
        self.a = None if a is None else Adapter(a, axes=(*leading, rows, "rank"))
        self.b = Adapter(b, axes=(*leading, "rank", columns))
        self.scale = scale
        self.dropout = dropout

    @property
    def size(self) -> int:
        """Parameters of the factors that it holds, of all layers of a stack."""
        return math.prod(self.b.shape) + (0 if self.a is None else math.prod(self.a.shape))

    def apply(
        self, x: Float[Array, "... In"], dtype: jnp.dtype, a: nnx.Param | None = None
    ) -> Float[Array, "... Out"]:
        """What the change adds to the product with `x`: float32 accumulation, factors cast to
        `dtype`."""
        a = self.a if a is None else a
        low = jnp.matmul(x.astype(dtype), a[...].astype(dtype), preferred_element_type=jnp.float32)
        low = (self.scale * low).astype(dtype)
        return jnp.matmul(low, self.b[...].astype(dtype), preferred_element_type=jnp.float32)

    def matrices(self) -> tuple[Weight, Weight]:
        """Both factors as products take them, the scale in the second."""
        return (
            Weight(self.a[...], self.a.axes),
            Weight(self.scale * self.b[...], self.b.axes),
        )

    def product(self, a: nnx.Param | None = None) -> Float[Array, "... In Out"]:
        """The change itself, float32."""
        a = (self.a if a is None else a)[...].astype(jnp.float32)
        return self.scale * jnp.einsum("...ir,...ro->...io", a, self.b[...].astype(jnp.float32))
