"""Experts' weighted sums of tokens, their rows made in windows, whatever formats they are in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nemotron_jax.config.precision import HIGH
from nemotron_jax.quant import mix_emulated, mix_packed, observe, windows
from nemotron_jax.quant.codes import Codes
from nemotron_jax.quant.matmul import (
    EXPERT_ROLES,
    check_high,
    row_alignment,
    row_numbers,
    spec_of,
    words_of,
)
from nemotron_jax.quant.windows import Loop, Window
from nemotron_jax.sharding.weights import Cuts, scattered, whole
from nemotron_jax.types import Context, Packed, Rows
from pallas_kernels import ExpertOrder, grouped_mlp, grouped_mlp_gradients


def window_rows(entries: int, devices: int, context: Context) -> int | None:
    """Rows of one window, of all entries of a group of devices; None where all rows are made at
    once: where one window would hold them, where only one of up and down is in a lower format, and
    while products are observed.
    """
    high = {context.format(role) == HIGH for role in EXPERT_ROLES}
    if len(high) > 1 or observe.observed():
        return None
    factor, align = context.execution.expert_rows, row_alignment(context)
    return windows.window_rows(entries, devices, factor, align)


def mix_in_windows(
    x: Float[Array, "N L"],
    weights: Float[Array, "N R"],
    up: Float[Array, "_ _ _"] | Packed,
    down: Float[Array, "_ _ _"] | Packed,
    order: ExpertOrder,
    window: int,
    *,
    context: Context,
    cuts: tuple[Cuts, Cuts],
    codes: tuple[Codes | None, Codes | None] = (None, None),
    rows: Rows = Rows(),
) -> Float[Array, "N L"]:
    """Each token's weighted sum of squared-ReLU experts; float32.

    The same as `expert_mlp` of all rows and `combine_rows`, but a loop makes `window` of them at a
    time, as many times as this device's own load needs: one with every token takes longer, none
    needs more memory, and nothing is dropped. No device waits for another inside of a loop. Groups
    of `order` are aligned as the formats want; `up` and `down` are this device's parts, cut as
    `cuts` say; `rows` are the N tokens'. Raises ValueError as `expert_mlp` does.
    """
    x = x.astype(context.dtype)
    if isinstance(up, Packed):
        check_high(up, context)
        kernel = {"implementation": context.kernel("grouped_matmul"), "target": context.target}
        return mix_packed.mix(x, weights, (up, down), order, window, cuts=cuts, kernel=kernel)
    if context.format(EXPERT_ROLES[0]) == HIGH:
        settings = Settings(window, cuts, context.kernel("grouped_matmul"), context.target)
        return _mix(settings, x, weights, up, down, order)
    each = zip(EXPERT_ROLES, cuts, strict=True)
    specs = [spec_of(role, context, (jnp.dtype(context.dtype),), cuts=cut) for role, cut in each]
    settings = mix_emulated.Settings(window, *specs)
    words = tuple(words_of(role, rows) for role in EXPERT_ROLES)
    numbers = row_numbers(order, rows, context, cuts[0].owners)
    given = mix_emulated.Given(x, weights, up, down, words, numbers, order, codes)
    return mix_emulated.mix(settings, given)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a mix does, but for its arrays; a static argument."""

    rows: int
    cuts: tuple[Cuts, Cuts]
    implementation: str | None
    target: str | None

    @property
    def kernel(self) -> dict[str, str | None]:
        """The choice of a kernel, as ops of pallas_kernels take it."""
        return {"implementation": self.implementation, "target": self.target}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
    settings: Settings, x: Array, weights: Array, up: Array, down: Array, order: ExpertOrder
) -> Array:
    matrices = _matrices(settings, x, up, down)

    def add(window: Window, total: Array) -> Array:
        y = grouped_mlp(window.of(x), *matrices, window.sizes, **settings.kernel)
        return window.add(total, y.astype(jnp.float32) * window.weight[:, None])

    return Loop(settings.rows, order, weights).over(add, jnp.zeros(x.shape, jnp.float32))


def _mix_forward(settings: Settings, *arrays: Array) -> tuple[Array, tuple]:
    return _mix(settings, *arrays), arrays


def _mix_backward(settings: Settings, arrays: tuple, dout: Array) -> tuple:
    x, weights, up, down, order = arrays
    matrices, dout = _matrices(settings, x, up, down), windows.as_it_came(dout, x)

    def add(window: Window, totals: tuple) -> tuple:
        dx, products, dup, ddown = totals
        rows, given = window.of(x), window.of(dout).astype(jnp.float32)
        y = grouped_mlp(rows, *matrices, window.sizes, **settings.kernel)  # kept by nobody
        dy = (given * window.weight[:, None]).astype(x.dtype)
        drows, *more = grouped_mlp_gradients(rows, *matrices, window.sizes, dy, **settings.kernel)
        product = jnp.sum(y.astype(jnp.float32) * given, axis=1)
        products = jax.lax.dynamic_update_slice(products, product, (window.first,))
        return window.add(dx, drows), products, dup + more[0], ddown + more[1]

    loop = Loop(settings.rows, order, weights)
    shapes = (x.shape, (loop.room,), *(matrix.shape for matrix in matrices))
    dx, products, *dmatrices = loop.over(add, tuple(jnp.zeros(s, jnp.float32) for s in shapes))
    dweights = loop.of_entries(products).astype(weights.dtype)
    dup, ddown = (scattered(*one) for one in zip(dmatrices, settings.cuts, strict=True))
    return dx.astype(x.dtype), dweights, dup.astype(up.dtype), ddown.astype(down.dtype), None


_mix.defvjp(_mix_forward, _mix_backward)


def _matrices(settings: Settings, x: Array, *parts: Array) -> list[Array]:
    """This device's experts in the dtype of `x`: gathered once, before the loop."""
    return [whole(part, cut, x.dtype) for part, cut in zip(parts, settings.cuts, strict=True)]
