"""Experts' rows in windows: room for little more than a balanced load, whatever the router does."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import ExpertOrder

STEP = 8  # rows that a window is a multiple of: a tile of float32 on a TPU
# Rows whose values are added up at one time. They are copied in float32 for it, by token: of a
# whole window that would be the most that any product of the backward pass holds.
ADDED_ROWS = 8192


def window_rows(entries: int, devices: int, factor: float, align: int = 1) -> int | None:
    """Rows of one window, `factor` times a balanced load, where a group of devices has `entries`;
    None where one holds them all.

    A multiple of `align`, so that no window ends inside of a block of rows.
    """
    step = math.lcm(STEP, align)
    rows = step * math.ceil(factor * entries / devices / step)
    return rows if rows < entries else None


def as_it_came(dout: Float[Array, "N L"], x: Float[Array, "N L"]) -> Float[Array, "N L"]:
    """The gradient of float32 sums in the dtype of their tokens, in which it travelled to the
    experts: the same numbers, and not a float32 array of all devices' tokens."""
    return dout.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """As many rows of an order as a window has: contiguous experts, the outer ones cut."""

    index: Int[Array, ""]
    token: Int[Array, "W"]
    weight: Float[Array, "W"]  # of the row's expert in the token's sum; 0 where a row holds nothing
    holds: Bool[Array, "W"]
    sizes: Int[Array, "E"]
    numbers: Int[Array, "W"] | None  # by which random bits are drawn

    @property
    def first(self) -> Int[Array, ""]:
        """The place in the order of its first row."""
        return self.index * self.token.shape[0]

    def of(self, values: Float[Array, "N L"]) -> Float[Array, "W L"]:
        """Each row's token's values; zeros where it holds nothing."""
        return jnp.where(self.holds[:, None], values[self.token], 0)

    def add(self, total: Float[Array, "N L"], values: Float[Array, "W L"]) -> Float[Array, "N L"]:
        """The total with each row's values added to its token's.

        Sorted by token, so that sums have one order and neighbours share what they write to.
        """
        by_token, rows = jnp.argsort(self.token), self.token.shape[0]
        height = min(ADDED_ROWS, rows)

        def piece(i: Array, total: Array) -> Array:
            start = jnp.minimum(i * height, rows - height)
            row = jax.lax.dynamic_slice(by_token, (start,), (height,))
            fresh = start + jnp.arange(height) >= i * height  # the last piece may reach back
            kept = (self.holds[row] & fresh)[:, None]
            added = jnp.where(kept, values[row], 0).astype(jnp.float32)
            return total.at[self.token[row]].add(added, indices_are_sorted=True)

        count = -(-rows // height)
        return (
            piece(jnp.int32(0), total) if count == 1 else jax.lax.fori_loop(0, count, piece, total)
        )


@dataclasses.dataclass(frozen=True)
class Loop:
    """The windows of an order: as many as this device's own rows need."""

    rows: int  # of a window
    order: ExpertOrder
    weights: Float[Array, "N R"]
    numbers: Int[Array, "rows"] | None = None  # of the order's rows

    @property
    def room(self) -> int:
        """Rows of all windows there may be."""
        return -(-self.order.row_entry.shape[0] // self.rows) * self.rows

    def over(self, add: Callable[[Window, Any], Any], start: Any, *, back: bool = False) -> Any:
        """`add` of each window in turn, the last one first with `back`; no device waits inside."""
        order, flat = self.order, self.weights.astype(jnp.float32).reshape(-1)
        padded = lambda row: jnp.pad(row, (0, self.room - row.shape[0]))
        tables = [order.row_entry, order.holds] + ([] if self.numbers is None else [self.numbers])
        tables = [padded(table) for table in tables]
        ends = jnp.cumsum(order.group_sizes)
        starts, count = ends - order.group_sizes, -(-ends[-1] // self.rows)

        def body(carry: tuple) -> tuple:
            turn, total = carry
            index = count - 1 - turn if back else turn
            first = index * self.rows
            part = lambda table: jax.lax.dynamic_slice(table, (first,), (self.rows,))
            entry, holds, *numbers = map(part, tables)
            inside = lambda places: jnp.clip(places - first, 0, self.rows)
            window = Window(
                index,
                entry // self.weights.shape[1],
                jnp.where(holds, flat[entry], 0),
                holds,
                inside(ends) - inside(starts),
                *(numbers or [None]),
            )
            return turn + 1, add(window, total)

        return jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), start))[1]

    def of_entries(self, of_rows: Float[Array, "rows"]) -> Float[Array, "N R"]:
        """What each entry's row has; zeros where it has none."""
        return jnp.where(self.order.routed, of_rows[self.order.entry_row], 0)
