"""Experts' weighted sums by matrices that stay codes, rows in windows."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from nemotron_jax.quant import packed, windows
from nemotron_jax.quant.packed import Settings
from nemotron_jax.quant.windows import Loop, Window
from nemotron_jax.sharding.weights import Cuts
from nemotron_jax.types import Packed
from pallas_kernels import (
    ExpertOrder,
    PackedExperts,
    grouped_matmul_packed,
    grouped_matmul_packed_transposed,
)


def mix(
    x: Float[Array, "N L"],
    weights: Float[Array, "N R"],
    experts: tuple[Packed, Packed],
    order: ExpertOrder,
    window: int,
    *,
    cuts: tuple[Cuts, Cuts],
    kernel: dict[str, str | None],
) -> Float[Array, "N L"]:
    """`mix_in_windows` where up and down are codes. Raises ValueError as `packed.product` does."""
    settings = tuple(Settings(one.name, one.is_base, None, **kernel) for one in experts)
    whole = (packed.whole(one.value, cut) for one, cut in zip(experts, cuts, strict=True))
    return _mix((window, *settings), x, weights, tuple(whole), order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
    settings: tuple[int, Settings, Settings],
    x: Array,
    weights: Array,
    experts: tuple[PackedExperts, PackedExperts],
    order: ExpertOrder,
) -> Array:
    rows, kernel = settings[0], settings[1].kernel

    def add(window: Window, total: Array) -> Array:
        given = window.of(x)
        hidden = grouped_matmul_packed(
            given, experts[0], window.sizes, activation="relu2", **kernel
        )
        y = grouped_matmul_packed(hidden, experts[1], window.sizes, **kernel)
        return window.add(total, y.astype(jnp.float32) * window.weight[:, None])

    return Loop(rows, order, weights).over(add, jnp.zeros(x.shape, jnp.float32))


def _forward(settings: tuple, x, weights, experts, order) -> tuple[Array, tuple]:
    experts = tuple(
        packed.without_gradient(*one) for one in zip(settings[1:], experts, strict=True)
    )
    x, weights, order = packed.values((x, weights, order))
    return _mix(settings, x, weights, experts, order), (x, weights, experts, order)


def _backward(settings: tuple, operands: tuple, dout: Array | SymbolicZero) -> tuple:
    if isinstance(dout, SymbolicZero):
        return None, None, None, None
    x, weights, (up, down), order = operands
    dout = windows.as_it_came(dout, x)
    rows, kernel = settings[0], settings[1].kernel
    times = functools.partial(grouped_matmul_packed, **kernel)
    times_turned = functools.partial(grouped_matmul_packed_transposed, **kernel)

    def add(window: Window, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, products = totals
        given = window.of(dout).astype(jnp.float32)
        positive = jax.nn.relu(times(window.of(x), up, window.sizes))
        y = times(jnp.square(positive), down, window.sizes)
        product = jnp.sum(y.astype(jnp.float32) * given, axis=1)
        products = jax.lax.dynamic_update_slice(products, product, (window.first,))
        dy = (given * window.weight[:, None]).astype(x.dtype)
        dinner = 2 * positive * times_turned(dy, down, window.sizes)
        return window.add(dx, times_turned(dinner, up, window.sizes)), products

    loop = Loop(rows, order, weights)
    dx, products = loop.over(add, (jnp.zeros(x.shape, jnp.float32), jnp.zeros(loop.room)))
    return dx.astype(x.dtype), loop.of_entries(products).astype(weights.dtype), None, None


_mix.defvjp(_forward, _backward, symbolic_zeros=True)
