"""Routed experts: tokens sorted by expert, a grouped matmul, and the weighted sum back."""

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax import quant
from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.linear import normal
from nemotron_jax.types import Context
from pallas_kernels import combine_rows, gather_rows, sort_by_expert


class Experts(nnx.Module):
    """Squared-ReLU experts at the latent width, or the model's where there is no latent."""

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        dtype: str = "float32",
    ) -> None:
        count, hidden = config.num_experts, config.expert_width
        self.up = nnx.Param(
            normal(rngs, (count, width, hidden), std, dtype),
            axes=("experts", "latent", "expert_hidden"),
        )
        self.down = nnx.Param(
            normal(rngs, (count, hidden, width), out_std, dtype),
            axes=("experts", "expert_hidden", "latent"),
        )

    def __call__(
        self,
        x: Float[Array, "N L"],
        index: Int[Array, "N R"],
        weights: Float[Array, "N R"],
        valid: Bool[Array, "N"] | None,
        context: Context,
    ) -> tuple[Float[Array, "N L"], Int[Array, "E"]]:
        """Mixed expert outputs and how many tokens each expert got; tokens that are not valid get
        zeros."""
        up, down = self.up[...], self.down[...]
        align = quant.row_alignment(context)
        order = sort_by_expert(index, up.shape[0], valid, align=align)
        rows = gather_rows(x, order)
        rows = quant.expert_mlp(rows, up, down, order, context=context)
        return combine_rows(rows, weights, order).astype(x.dtype), order.load
