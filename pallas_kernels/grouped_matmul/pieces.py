"""How one visit's rows, and an output's columns, go through the matrix unit: piece by piece."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

ALIGN = 16  # rows: a tile of bfloat16 is 16 high, so pieces start at multiples of it
STEP = 32  # rows: pieces are multiples of it; less saves no time, a product's start costs that
DEEP = 128  # the same where rows are summed over: a matrix unit is so deep, filled or not
LARGE = 256  # rows of a whole piece: enough to hide that a matrix unit loads its weights
# Columns of one product, the first that divides: as many as registers hold without spilling, and,
# where the sums are added to fast memory, as many as make a product's start small beside it.
WIDTHS = (512, 384, 256)
WIDER = (1024, 896, *WIDTHS)


def over_pieces(
    low: Array,
    high: Array,
    tile_rows: int,
    piece: Callable[[Any, int, Any], None],
    step: int = STEP,
) -> None:
    """Calls `piece(first row, height, own)` so that pieces cover rows low .. high - 1 of a tile.

    All but the last are LARGE high, the last is the fewest multiples of `step` that hold the rest.
    A piece may begin before `low` and end after `high`; rows are masked where they are used. Those
    before `own` are in the piece before it too, where the tile's end has moved the last one up.
    """
    large = min(LARGE, tile_rows)
    begin = low & -ALIGN
    whole = lax.div(high - begin, large)  # `//` asks the tracing host what TPU it is

    @pl.loop(0, whole)
    def _(i):
        start = pl.multiple_of(begin + i * large, ALIGN)
        piece(start, large, start)

    covered = begin + whole * large
    rest = high - covered
    for height in range(step, large + step, step):
        fewer, height = height - step, min(height, large)

        @pl.when((rest > fewer) & (rest <= height) & (high > low))
        def _(height=height):
            start = jnp.minimum(covered, tile_rows - height)
            piece(pl.multiple_of(start, ALIGN), height, covered)


def over_columns(size: int, columns: Callable[[Any], None], widths: Sequence[int] = WIDTHS) -> None:
    """Calls `columns(slice)` over all of `size` columns."""
    width = column_width(size, widths)

    @pl.loop(0, size // width)
    def _(i):
        columns(pl.ds(pl.multiple_of(i * width, width), width))

    if rest := size % width:
        columns(pl.ds(size - rest, rest))


def column_width(size: int, widths: Sequence[int] = WIDTHS) -> int:
    """Columns of one product: the first of `widths` that divides them all, or the least loss."""
    return next((width for width in widths if size % width == 0), min(WIDTHS[0], size))


def row_mask(start: Array, height: int, low: Array, high: Array) -> Array:
    """Which of a piece's rows are low .. high - 1."""
    row = start + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
    return (row >= low) & (row < high)
