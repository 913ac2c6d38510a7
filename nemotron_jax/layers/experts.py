"""Routed experts: tokens sorted by expert, a grouped matmul, and the weighted sum back."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nemotron_jax import quant
from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.kept_codes import KeptCodes
from nemotron_jax.layers.low_rank import LowRank
from nemotron_jax.layers.packed import PackedMatrix
from nemotron_jax.quant.codes import Codes
from nemotron_jax.sharding.weights import Cuts
from nemotron_jax.types import Context, Packed, Rows, Weight
from pallas_kernels import combine_rows, gather_rows, sort_by_expert


class Experts(nnx.Module):
    """Squared-ReLU experts at the latent width, or the model's where there is no latent."""

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        init: Init,
    ) -> None:
        count, hidden = config.num_experts, config.expert_width
        self.up: nnx.Param | PackedMatrix = nnx.Param(
            init.normal(count, width, hidden),
            axes=("experts", "latent", "expert_hidden"),
        )
        self.down: nnx.Param | PackedMatrix = nnx.Param(
            init.out.normal(count, hidden, width),
            axes=("experts", "expert_hidden", "latent"),
        )
        self.up_adapter: LowRank | None = nnx.data(None)
        self.down_adapter: LowRank | None = nnx.data(None)
        self.up_codes: KeptCodes | None = nnx.data(None)
        self.down_codes: KeptCodes | None = nnx.data(None)

    def matrices(self) -> tuple[Weight | Packed, ...]:
        """Up and down projections of all experts, as their products take them; with adapters,
        then their factors A and B, up's before down's."""
        own = tuple(
            matrix.weight(f"experts.{name}")
            if isinstance(matrix, PackedMatrix)
            else Weight(matrix[...], matrix.axes, codes and codes.value())
            for name, matrix, codes in (
                ("up", self.up, self.up_codes),
                ("down", self.down, self.down_codes),
            )
        )
        adapters = (self.up_adapter, self.down_adapter)
        return own + tuple(f for one in adapters if one is not None for f in one.matrices())


def mix(
    x: Float[Array, "N L"],
    index: Int[Array, "N R"],
    weights: Float[Array, "N R"],
    matrices: Sequence[Float[Array, "E _ _"] | Packed],
    rows: Rows,
    context: Context,
    *,
    num_experts: int,
    cuts: tuple[Cuts, Cuts] = (Cuts(), Cuts()),
    codes: tuple[Codes | None, Codes | None] = (None, None),
    devices: int = 1,
) -> tuple[Float[Array, "N L"], Int[Array, "E"]]:
    """Mixed expert outputs and how many tokens each expert got; padding gets zeros.

    A function of tokens that are all at hand: `Rows` hold those of these N. Experts are counted
    from this device's first; what `index` has below 0 or from `num_experts` on is another's, and
    adds nothing. Of up and down, and of their codes, it takes this device's parts, which devices
    share as `cuts` say.
    Where `devices` are more than one and have experts of their own, results are partial sums, in
    float32.
    """
    valid = None if rows.valid is None else rows.valid.reshape(-1)
    order = sort_by_expert(index, num_experts, valid, align=quant.row_alignment(context))
    up, down, *adapters = matrices
    window = quant.window_rows(index.size, devices, context)
    if window and not adapters:
        mixed = quant.mix_in_windows(
            x, weights, up, down, order, window, cuts=cuts, codes=codes, rows=rows, context=context
        )
        return mixed, order.load
    x = gather_rows(x, order)
    sorted_rows = quant.expert_mlp(
        x, up, down, order, adapters, cuts=cuts, codes=codes, rows=rows, context=context
    )
    dtype = jnp.float32 if cuts[0].owners else x.dtype
    return combine_rows(sorted_rows, weights, order, dtype), order.load
