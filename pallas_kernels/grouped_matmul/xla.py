"""Grouped products as loops over tiles: each takes the rows of one expert, and no tile is empty.

Every loop's trip count is the number of used tiles, known on the device alone; that makes it a
`while` without a derivative of its own, which the ops' custom VJPs never need.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul.tiles import tile_heights, tile_tables, window


def matmul(
    lhs: Float[Array, "rows K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"] | None = None,
    *,
    transpose_rhs: bool,
) -> Float[Array, "rows N"]:
    """Rows times their expert's matrix, or its transpose without making a copy of it, and scale."""
    contracting, columns = (1, 0) if transpose_rhs else (0, 1)

    def step(start: Array, mask: Array, expert: Array, out: Array) -> Array:
        tile = _rows(lhs, start, mask)
        product = _scaled(_dot(tile, _expert(rhs, expert), 1, contracting), scale, expert)
        return _put(out, product, start, mask)

    out = jnp.zeros((lhs.shape[0], rhs.shape[1 + columns]), lhs.dtype)
    return _over_tiles(step, out, lhs.shape[0], group_sizes, rhs[0].size)


def matmul_of(
    lhs: Float[Array, "rows K"],
    matrix: Callable[[Array], Float[Array, "K N"]],
    shape: tuple[int, int],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"],
    activation: str | None,
) -> Float[Array, "rows N"]:
    """Rows times `matrix(expert)` of this shape and scale, for matrices that are made when used."""

    def step(start: Array, mask: Array, expert: Array, out: Array) -> Array:
        tile = _rows(lhs, start, mask)
        product = _scaled(_dot(tile, matrix(expert), 1, 0), scale, expert)
        if activation == "relu2":
            product = jnp.square(jax.nn.relu(product))
        return _put(out, product, start, mask)

    out = jnp.zeros((lhs.shape[0], shape[1]), lhs.dtype)
    return _over_tiles(step, out, lhs.shape[0], group_sizes, shape[0] * shape[1])


def outer(
    lhs: Float[Array, "rows K"],
    dout: Float[Array, "rows N"],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"] | None = None,
) -> Float[Array, "E K N"]:
    """Each group's lhsᵀ dout and scale, accumulated and returned in float32; an empty group stays
    zero."""

    def step(start: Array, mask: Array, expert: Array, total: Array) -> Array:
        # Both sides are masked: a row outside the group may hold infinities, and inf * 0 is NaN.
        left, right = (jnp.where(mask, _rows(a, start, mask), 0) for a in (lhs, dout))
        return _accumulate(total, _scaled(_dot(left, right, 0, 0), scale, expert), expert)

    shape = (group_sizes.shape[0], lhs.shape[1], dout.shape[1])
    total = jnp.zeros(shape, jnp.float32)
    return _over_tiles(step, total, lhs.shape[0], group_sizes, shape[1] * shape[2])


def mlp(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "rows L"]:
    """Rows through their expert's relu²-MLP; the hidden of one tile never leaves the cache."""

    def step(start: Array, mask: Array, expert: Array, out: Array) -> Array:
        hidden = jax.nn.relu(_dot(_rows(lhs, start, mask), _expert(up, expert), 1, 0))
        hidden = jnp.square(hidden).astype(lhs.dtype)
        return _put(out, _dot(hidden, _expert(down, expert), 1, 0), start, mask)

    return _over_tiles(step, jnp.zeros_like(lhs), lhs.shape[0], group_sizes, up[0].size)


def mlp_gradients(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    dout: Float[Array, "rows L"],
) -> tuple[Float[Array, "rows L"], Float[Array, "E L F"], Float[Array, "E F L"]]:
    """Gradients of lhs, up and down (these in float32), recomputing each tile's hidden."""

    def step(start: Array, mask: Array, expert: Array, carry: Any) -> Any:
        dlhs, dup, ddown = carry
        tile, dtile = (jnp.where(mask, _rows(a, start, mask), 0) for a in (lhs, dout))
        positive = jax.nn.relu(_dot(tile, _expert(up, expert), 1, 0))
        dhidden = _dot(dtile, _expert(down, expert), 1, 1)
        dbefore = (2 * positive * dhidden).astype(lhs.dtype)
        dlhs = _put(dlhs, _dot(dbefore, _expert(up, expert), 1, 1), start, mask)
        dup = _accumulate(dup, _dot(tile, dbefore, 0, 0), expert)
        hidden = jnp.square(positive).astype(lhs.dtype)
        return dlhs, dup, _accumulate(ddown, _dot(hidden, dtile, 0, 0), expert)

    zeros = jnp.zeros(up.shape, jnp.float32), jnp.zeros(down.shape, jnp.float32)
    carry = (jnp.zeros_like(lhs), *zeros)
    return _over_tiles(step, carry, lhs.shape[0], group_sizes, up[0].size)


def _over_tiles(
    step: Callable[[Array, Array, Array, Any], Any],
    carry: Any,
    rows: int,
    group_sizes: Int[Array, "E"],
    matrix: int,
) -> Any:
    """Folds `step(first row, mask, expert, carry)` over all tiles, level by level."""
    heights = tile_heights(rows, group_sizes.shape[0], matrix)
    for tiles in tile_tables(group_sizes, rows, heights):

        def body(i: Array, carry: Any, tiles: Any = tiles) -> Any:
            return step(*window(tiles, i, rows), tiles.expert[i], carry)

        carry = lax.fori_loop(0, tiles.used, body, carry)
    return carry


def _rows(array: Float[Array, "rows _"], start: Array, mask: Bool[Array, "height 1"]) -> Array:
    return lax.dynamic_slice_in_dim(array, start, mask.shape[0])


def _expert(matrices: Array, expert: Array) -> Array:
    return lax.dynamic_index_in_dim(matrices, expert, keepdims=False)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    dtype = jnp.promote_types(left.dtype, right.dtype)
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(
        left.astype(dtype), right.astype(dtype), axes, preferred_element_type=jnp.float32
    )


def _scaled(product: Array, scale: Array | None, expert: Array) -> Array:
    return product if scale is None else product * scale[expert]


def _put(out: Array, product: Array, start: Array, mask: Array) -> Array:
    """`out` with the tile's rows replaced; the block's other rows belong to other tiles."""
    new = jnp.where(mask, product.astype(out.dtype), _rows(out, start, mask))
    return lax.dynamic_update_slice_in_dim(out, new, start, 0)


def _accumulate(total: Array, product: Array, expert: Array) -> Array:
    return lax.dynamic_update_index_in_dim(total, _expert(total, expert) + product, expert, 0)
