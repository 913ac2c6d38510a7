"""Every weight matmul of the model passes through here, so that precision is decided in one
place."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nemotron_jax.config.precision import HIGH, ROLES
from nemotron_jax.quant import emulated
from nemotron_jax.quant.operands import alignment
from nemotron_jax.types import Context
from pallas_kernels import ExpertOrder, grouped_matmul, grouped_mlp, nvfp4

EXPERT_ROLES = ("expert_up", "expert_down")


def dot(
    x: Float[Array, "... In"],
    weight: Float[Array, "In Out"],
    *,
    role: str,
    context: Context,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "... Out"]:
    """`x @ weight` in the compute dtype, accumulated in float32.

    `weight` is the master; its cast to the compute dtype happens here, and its gradient comes back
    in the master's dtype from a float32 accumulation. `role` names the matmul for the precision
    recipe: where that wants a lower format, operands are quantised and dequantised.
    """
    out_dtype = jnp.dtype(context.dtype if out_dtype is None else out_dtype)
    x = x.astype(context.dtype)
    if context.format(role) == HIGH:
        return _dot(x, weight, out_dtype)
    flat = x.reshape(-1, x.shape[-1])
    tokens = context.first_token + jnp.arange(flat.shape[0])
    spec = _spec(role, context, out_dtype)
    y = emulated.dot(spec, flat, weight, _words(role, context), tokens)
    return y.reshape(*x.shape[:-1], -1)


def dot_together(
    x: Float[Array, "... In"],
    weights: Sequence[Float[Array, "In _"]],
    *,
    role: str,
    context: Context,
    out_dtypes: Sequence[jnp.dtype | None],
) -> list[Float[Array, "... _"]]:
    """`x` times each weight, each result in its own dtype (None: the compute dtype).

    In a lower format the weights are one matrix, with one largest magnitude, as the published
    checkpoints' fused projections are.
    """
    options = {"role": role, "context": context}
    if context.format(role) == HIGH:
        pairs = zip(weights, out_dtypes, strict=True)
        return [dot(x, weight, out_dtype=dtype, **options) for weight, dtype in pairs]
    y = dot(x, jnp.concatenate(weights, axis=1), out_dtype=jnp.float32, **options)
    ends = list(itertools.accumulate(weight.shape[1] for weight in weights))
    parts = zip(jnp.split(y, ends[:-1], axis=-1), out_dtypes, strict=True)
    return [part.astype(dtype or context.dtype) for part, dtype in parts]


def row_alignment(context: Context) -> int:
    """Rows that each expert's group must be a multiple of, for `expert_mlp`."""
    return max(alignment(context.format(role)) for role in EXPERT_ROLES)


def expert_mlp(
    rows: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    order: ExpertOrder,
    *,
    context: Context,
) -> Float[Array, "rows L"]:
    """Squared-ReLU experts over rows sorted by expert; rows past the groups' sum give zeros."""
    rows, sizes = rows.astype(context.dtype), order.group_sizes
    if all(context.format(role) == HIGH for role in EXPERT_ROLES):
        return grouped_mlp(rows, up, down, sizes, implementation=context.implementation)
    entries = context.first_token * order.entry_row.shape[1] + order.row_entry
    entries = jnp.where(order.holds, entries, ~jnp.arange(entries.shape[0]))
    for role, weight in zip(EXPERT_ROLES, (up, down), strict=True):
        if role == EXPERT_ROLES[1]:
            rows = jnp.square(jax.nn.relu(rows))
        if context.format(role) == HIGH:
            rows = grouped_matmul(rows, weight, sizes, implementation=context.implementation)
        else:
            spec = _spec(role, context, jnp.dtype(context.dtype))
            rows = emulated.grouped_dot(spec, rows, weight, sizes, _words(role, context), entries)
    return rows


def _spec(role: str, context: Context, out_dtype: jnp.dtype) -> emulated.Spec:
    options = context.execution.precision.nvfp4
    return emulated.Spec(role, context.format(role), options, out_dtype, context.implementation)


def _words(role: str, context: Context) -> Array:
    """Random words of this role's matmul; any two where nothing is drawn."""
    if context.words is None:
        return jnp.zeros(2, jnp.uint32)
    return nvfp4.fold(context.words, ROLES.index(role))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: Array, weight: Array, out_dtype: jnp.dtype) -> Array:
    return _contract(x, weight.astype(x.dtype), x.ndim - 1, 0).astype(out_dtype)


def _dot_forward(x: Array, weight: Array, out_dtype: jnp.dtype) -> tuple[Array, tuple]:
    return _dot(x, weight, out_dtype), (x, weight)


def _dot_backward(out_dtype: jnp.dtype, residuals: tuple, dy: Array) -> tuple[Array, Array]:
    x, weight = residuals
    dy = dy.astype(x.dtype)
    dx = _contract(dy, weight.astype(x.dtype), dy.ndim - 1, 1).astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    dweight = _contract(rows, dy.reshape(-1, dy.shape[-1]), 0, 0)
    return dx, dweight.astype(weight.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _contract(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    numbers = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)
