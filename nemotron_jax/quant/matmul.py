"""Every weight matmul of the model passes through here, so that precision is decided in one
place."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nemotron_jax.types import Context
from pallas_kernels import grouped_mlp


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
    recipe (the matmuls of every role run in the compute dtype today).
    """
    del role
    out_dtype = context.dtype if out_dtype is None else out_dtype
    return _dot(x.astype(context.dtype), weight, jnp.dtype(out_dtype))


def expert_mlp(
    rows: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Array,
    *,
    context: Context,
) -> Float[Array, "rows L"]:
    """Squared-ReLU experts over rows sorted by expert; rows past the groups' sum give zeros."""
    return grouped_mlp(
        rows.astype(context.dtype), up, down, group_sizes, implementation=context.implementation
    )


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
