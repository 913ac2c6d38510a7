"""Routed experts: tokens sorted by expert, a grouped matmul, and the weighted sum back."""

from flax import nnx
from jaxtyping import Array, Float, Int

from nemotron_jax import quant
from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.linear import normal
from nemotron_jax.types import Context, Rows, Weight
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

    def matrices(self) -> tuple[Weight, Weight]:
        """Up and down projections of all experts, as their products take them."""
        return tuple(Weight(matrix[...], matrix.axes) for matrix in (self.up, self.down))


def mix(
    x: Float[Array, "N L"],
    index: Int[Array, "N R"],
    weights: Float[Array, "N R"],
    matrices: tuple[Float[Array, "E L F"], Float[Array, "E F L"]],
    rows: Rows,
    context: Context,
) -> tuple[Float[Array, "N L"], Int[Array, "E"]]:
    """Mixed expert outputs and how many tokens each expert got; padding gets zeros.

    A function of tokens and experts that are all at hand: `Rows` hold those of these N tokens.
    """
    valid = None if rows.valid is None else rows.valid.reshape(-1)
    align = quant.row_alignment(context)
    order = sort_by_expert(index, matrices[0].shape[0], valid, align=align)
    sorted_rows = quant.expert_mlp(
        gather_rows(x, order), *matrices, order, rows=rows, context=context
    )
    return combine_rows(sorted_rows, weights, order).astype(x.dtype), order.load
