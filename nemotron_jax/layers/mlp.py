"""Squared-ReLU MLP: the dense `-` layer, and every MoE layer's shared expert."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear
from nemotron_jax.types import Context, Rows


class MLP(nnx.Module):
    """`down(relu(up(x))²)` at the model's width."""

    def __init__(
        self,
        role: str,
        width: int,
        hidden: int,
        init: Init,
        *,
        bias: bool = False,
    ) -> None:
        up_axes, down_axes = ("width", "mlp_hidden"), ("mlp_hidden", "width")
        self.up = Linear(f"{role}_up", up_axes, (width, hidden), init, bias=bias)
        self.down = Linear(f"{role}_down", down_axes, (hidden, width), init.out, bias=bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        state: None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], None, None]:
        hidden = jnp.square(jax.nn.relu(self.up(x, context, rows)))
        return self.down(hidden, context, rows), None, None
