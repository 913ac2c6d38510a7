"""A matrix, stored input-first, and its optional bias."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax import quant
from nemotron_jax.config.precision import ROLES
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.kept_codes import KeptCodes
from nemotron_jax.layers.low_rank import LowRank
from nemotron_jax.types import Axes, Context, Rows, Weight
from pallas_kernels import nvfp4

_DROPOUT = 64  # dropout's random streams begin here, past those of rounding, which count roles


class Linear(nnx.Module):
    """`x @ weight + bias`; `role` names the matmul for the precision recipe."""

    def __init__(
        self,
        role: str,
        axes: Axes,
        shape: tuple[int, int],
        init: Init,
        *,
        bias: bool = False,
    ) -> None:
        self.role = role
        self.weight = nnx.Param(init.normal(*shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1], init.dtype), axes=axes[1:]) if bias else None
        self.adapter: LowRank | None = nnx.data(None)
        self.weight_codes: KeptCodes | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "... In"],
        context: Context,
        rows: Rows = Rows(),
        out_dtype: jnp.dtype | None = None,
    ) -> Float[Array, "... Out"]:
        y = quant.dot(
            x, self.matrix(), role=self.role, context=context, rows=rows, out_dtype=out_dtype
        )
        if self.adapter is not None:
            x = _dropped(x, self.adapter, self.role, rows)
            y = _adapted(y, x, self.adapter, None, context)
        return self._biased(y)

    def matrix(self) -> Weight:
        """The weight as its product takes it."""
        codes = None if self.weight_codes is None else self.weight_codes.value()
        return Weight(self.weight[...], self.weight.axes, codes)

    def _biased(self, y: Float[Array, "... Out"]) -> Float[Array, "... Out"]:
        if self.bias is None:
            return y
        # In float32, so that the bias's gradient is added up so over tokens and devices.
        return (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)


def project_together(
    linears: Sequence[Linear],
    x: Float[Array, "... In"],
    context: Context,
    rows: Rows,
    out_dtypes: Sequence[jnp.dtype | None],
) -> list[Float[Array, "... _"]]:
    """What several projections of one role make of `x`, each in its dtype."""
    weights = [linear.matrix() for linear in linears]
    role, first = linears[0].role, linears[0].adapter
    products = quant.dot_together(
        x, weights, role=role, context=context, rows=rows, out_dtypes=out_dtypes
    )
    if first is not None:
        x = _dropped(x, first, role, rows)
        products = [
            _adapted(y, x, linear.adapter, first, context)
            for linear, y in zip(linears, products, strict=True)
        ]
    return [linear._biased(y) for linear, y in zip(linears, products, strict=True)]


def _adapted(
    y: Float[Array, "... Out"],
    x: Float[Array, "... In"],
    adapter: LowRank,
    first: LowRank | None,
    context: Context,
) -> Float[Array, "... Out"]:
    """The product with what an adapter adds; linears projected together share the first one's A."""
    a = first.a if adapter.a is None else adapter.a
    return y + adapter.apply(x, context.dtype, a).astype(y.dtype)


def _dropped(
    x: Float[Array, "... In"], adapter: LowRank, role: str, rows: Rows
) -> Float[Array, "... In"]:
    """The adapter's inputs with a share of them left out and the rest scaled up, in training: where
    there are random words. Which ones depends on the token's number, not on who computes it."""
    share = adapter.dropout
    if not share or rows.words is None:
        return x
    words = nvfp4.fold(rows.words, _DROPOUT + ROLES.index(role))
    drawn = nvfp4.uniform(words, rows.numbers.reshape(-1), x.shape[-1]).reshape(x.shape)
    return jnp.where(drawn < share, 0, x / (1 - share)).astype(x.dtype)
