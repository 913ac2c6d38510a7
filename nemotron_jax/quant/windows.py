"""Experts' rows in windows: room for little more than a balanced load, whatever the router does."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.sharding import Cuts, scattered, whole
from nemotron_jax.types import Context
from pallas_kernels import ExpertOrder, grouped_mlp, grouped_mlp_gradients

STEP = 8  # rows that a window is a multiple of: a tile of float32 on a TPU


def window_rows(entries: int, devices: int, context: Context) -> int | None:
    """Rows of one window, of all entries of a group of devices; None where one holds them all."""
    rows = context.execution.expert_rows * entries / devices
    rows = STEP * math.ceil(rows / STEP)
    return rows if rows < entries else None


def mix_in_windows(
    x: Float[Array, "N L"],
    weights: Float[Array, "N R"],
    up: Float[Array, "_ _ _"],
    down: Float[Array, "_ _ _"],
    order: ExpertOrder,
    rows: int,
    *,
    context: Context,
    cuts: tuple[Cuts, Cuts],
) -> Float[Array, "N L"]:
    """Each token's weighted sum of squared-ReLU experts, in high precision; float32.

    The same as `expert_mlp` of all rows and `combine_rows`, but a loop makes `rows` of them at a
    time, as many times as this device's own load needs: one with every token takes longer, none
    needs more memory, and nothing is dropped. No device waits for another inside. `order` is not
    aligned; `up` and `down` are this device's parts, cut as `cuts` say.
    """
    settings = Windows(rows, cuts, context.kernel("grouped_matmul"), context.target)
    return _mix(settings, x.astype(context.dtype), weights, up, down, order)


@dataclasses.dataclass(frozen=True)
class Windows:
    """What a mix does, but for its arrays; a static argument."""

    rows: int
    cuts: tuple[Cuts, Cuts]
    implementation: str | None
    target: str | None

    @property
    def kernel(self) -> dict[str, str | None]:
        return {"implementation": self.implementation, "target": self.target}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Rows `first` to `first + rows` of an order: contiguous experts, the outer ones cut."""

    first: Int[Array, ""]
    token: Int[Array, "W"]
    weight: Float[Array, "W"]  # of the row's expert in the token's sum; 0 where a row holds nothing
    holds: Bool[Array, "W"]
    sizes: Int[Array, "E"]
    by_token: Int[Array, "W"]  # the window's rows in the order of their tokens

    def of(self, values: Float[Array, "N L"]) -> Float[Array, "W L"]:
        """Each row's token's values; zeros where it holds nothing."""
        return jnp.where(self.holds[:, None], values[self.token], 0)

    def add(self, total: Float[Array, "N L"], values: Float[Array, "W L"]) -> Float[Array, "N L"]:
        """The total with each row's values added to its token's.

        Sorted by token, so that sums have one order and neighbours share what they write to.
        """
        values = jnp.where(self.holds[:, None], values, 0).astype(jnp.float32)[self.by_token]
        return total.at[self.token[self.by_token]].add(values, indices_are_sorted=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
    settings: Windows, x: Array, weights: Array, up: Array, down: Array, order: ExpertOrder
) -> Array:
    matrices = _matrices(settings, x, up, down)

    def add(window: Window, total: Array) -> Array:
        y = grouped_mlp(window.of(x), *matrices, window.sizes, **settings.kernel)
        return window.add(total, y.astype(jnp.float32) * window.weight[:, None])

    return _over_windows(settings, order, weights, add, jnp.zeros(x.shape, jnp.float32))


def _mix_forward(settings: Windows, *arrays: Array) -> tuple[Array, tuple]:
    return _mix(settings, *arrays), arrays


def _mix_backward(settings: Windows, arrays: tuple, dout: Array) -> tuple:
    x, weights, up, down, order = arrays
    matrices = _matrices(settings, x, up, down)

    def add(window: Window, totals: tuple) -> tuple:
        dx, products, dup, ddown = totals
        rows, given = window.of(x), window.of(dout)
        y = grouped_mlp(rows, *matrices, window.sizes, **settings.kernel)  # kept by nobody
        dy = (given * window.weight[:, None]).astype(x.dtype)
        drows, *more = grouped_mlp_gradients(rows, *matrices, window.sizes, dy, **settings.kernel)
        product = jnp.sum(y.astype(jnp.float32) * given, axis=1)
        products = jax.lax.dynamic_update_slice(products, product, (window.first,))
        return window.add(dx, drows), products, dup + more[0], ddown + more[1]

    room = _room(settings, order)
    start = [jnp.zeros(shape, jnp.float32) for shape in (x.shape, room)]
    start += [jnp.zeros(matrix.shape, jnp.float32) for matrix in matrices]
    totals = _over_windows(settings, order, weights, add, tuple(start))
    dx, products, *dmatrices = totals
    dweights = jnp.where(order.routed, products[order.entry_row], 0).astype(weights.dtype)
    dup, ddown = (scattered(*one) for one in zip(dmatrices, settings.cuts, strict=True))
    return dx.astype(x.dtype), dweights, dup.astype(up.dtype), ddown.astype(down.dtype), None


_mix.defvjp(_mix_forward, _mix_backward)


def _matrices(settings: Windows, x: Array, *parts: Array) -> list[Array]:
    """This device's experts in the dtype of `x`: gathered once, before the loop."""
    return [whole(part, cut, x.dtype) for part, cut in zip(parts, settings.cuts, strict=True)]


def _room(settings: Windows, order: ExpertOrder) -> int:
    """Rows of all windows there may be."""
    return -(-order.row_entry.shape[0] // settings.rows) * settings.rows


def _over_windows(
    settings: Windows,
    order: ExpertOrder,
    weights: Array,
    add: Callable[[Window, Any], Any],
    start: Any,
) -> Any:
    """`add` of each window in turn, as many as hold rows of this device."""
    missing = _room(settings, order) - order.row_entry.shape[0]
    entries = jnp.pad(order.row_entry, (0, missing))
    holds = jnp.pad(order.holds, (0, missing))
    ends, flat = jnp.cumsum(order.group_sizes), weights.astype(jnp.float32).reshape(-1)
    starts = ends - order.group_sizes

    def body(carry: tuple) -> tuple:
        first, total = carry
        entry, real = (
            jax.lax.dynamic_slice(array, (first,), (settings.rows,)) for array in (entries, holds)
        )
        inside = lambda places: jnp.clip(places - first, 0, settings.rows)
        token = entry // weights.shape[1]
        weight = jnp.where(real, flat[entry], 0)
        by_token = jnp.argsort(token)
        window = Window(first, token, weight, real, inside(ends) - inside(starts), by_token)
        return first + settings.rows, add(window, total)

    return jax.lax.while_loop(lambda carry: carry[0] < ends[-1], body, (jnp.int32(0), start))[1]
