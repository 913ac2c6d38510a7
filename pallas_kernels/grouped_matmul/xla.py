"""Grouped products as a loop over tiles: each takes the rows of one expert, and no tile is empty.

Every loop's trip count is the number of used tiles, known on the device alone; that makes it a
`while` without a derivative of its own, which the ops' custom VJPs never need.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.tiles import block_rows, tile_table, window


def matmul(
    lhs: Float[Array, "rows K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    transpose_rhs: bool,
) -> Float[Array, "rows N"]:
    """Rows times their expert's matrix, or its transpose without making a copy of it."""
    rows, block = lhs.shape[0], block_rows(lhs.shape[0], rhs.shape[0])
    tiles = tile_table(group_sizes, rows, block)
    contracting = 1 if transpose_rhs else 0
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]

    def step(i, out):
        start, mask = window(tiles, i, rows, block)
        tile = _rows(lhs, start, block)
        product = _dot(tile, _expert(rhs, tiles.expert[i]), 1, contracting)
        return _put(out, product, start, mask)

    return lax.fori_loop(0, tiles.used, step, jnp.zeros((rows, width), lhs.dtype))


def outer(
    lhs: Float[Array, "rows K"], dout: Float[Array, "rows N"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E K N"]:
    """Each group's lhsᵀ dout, accumulated and returned in float32; an empty group stays zero."""
    rows, experts = lhs.shape[0], group_sizes.shape[0]
    block = block_rows(rows, experts)
    tiles = tile_table(group_sizes, rows, block)

    def step(i, total):
        start, mask = window(tiles, i, rows, block)
        # Both sides are masked: a row outside the group may hold infinities, and inf * 0 is NaN.
        left = jnp.where(mask, _rows(lhs, start, block), 0)
        right = jnp.where(mask, _rows(dout, start, block), 0)
        return _accumulate(total, _dot(left, right, 0, 0), tiles.expert[i])

    zeros = jnp.zeros((experts, lhs.shape[1], dout.shape[1]), jnp.float32)
    return lax.fori_loop(0, tiles.used, step, zeros)


def mlp(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "rows L"]:
    """Rows through their expert's relu²-MLP; the hidden of one tile never leaves the cache."""
    rows, block = lhs.shape[0], block_rows(lhs.shape[0], up.shape[0])
    tiles = tile_table(group_sizes, rows, block)

    def step(i, out):
        start, mask = window(tiles, i, rows, block)
        hidden = _dot(_rows(lhs, start, block), _expert(up, tiles.expert[i]), 1, 0)
        hidden = jnp.square(jax.nn.relu(hidden)).astype(lhs.dtype)
        return _put(out, _dot(hidden, _expert(down, tiles.expert[i]), 1, 0), start, mask)

    return lax.fori_loop(0, tiles.used, step, jnp.zeros_like(lhs))


def mlp_gradients(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    dout: Float[Array, "rows L"],
) -> tuple[Float[Array, "rows L"], Float[Array, "E L F"], Float[Array, "E F L"]]:
    """Gradients of lhs, up and down (these in float32), recomputing each tile's hidden."""
    rows, block = lhs.shape[0], block_rows(lhs.shape[0], up.shape[0])
    tiles = tile_table(group_sizes, rows, block)

    def step(i, carry):
        dlhs, dup, ddown = carry
        start, mask = window(tiles, i, rows, block)
        expert = tiles.expert[i]
        tile = jnp.where(mask, _rows(lhs, start, block), 0)
        dtile = jnp.where(mask, _rows(dout, start, block), 0)
        positive = jax.nn.relu(_dot(tile, _expert(up, expert), 1, 0))
        dhidden = _dot(dtile, _expert(down, expert), 1, 1)
        dbefore = (2 * positive * dhidden).astype(lhs.dtype)
        dlhs = _put(dlhs, _dot(dbefore, _expert(up, expert), 1, 1), start, mask)
        dup = _accumulate(dup, _dot(tile, dbefore, 0, 0), expert)
        hidden = jnp.square(positive).astype(lhs.dtype)
        return dlhs, dup, _accumulate(ddown, _dot(hidden, dtile, 0, 0), expert)

    zeros = jnp.zeros(up.shape, jnp.float32), jnp.zeros(down.shape, jnp.float32)
    return lax.fori_loop(0, tiles.used, step, (jnp.zeros_like(lhs), *zeros))


def _rows(array: Array, start: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(array, start, block)


def _expert(matrices: Array, expert: Array) -> Array:
    return lax.dynamic_index_in_dim(matrices, expert, keepdims=False)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    dtype = jnp.promote_types(left.dtype, right.dtype)
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(
        left.astype(dtype), right.astype(dtype), axes, preferred_element_type=jnp.float32
    )


def _put(out: Array, product: Array, start: Array, mask: Array) -> Array:
    """`out` with the tile's rows replaced; the block's other rows belong to other tiles."""
    old = _rows(out, start, product.shape[0])
    new = jnp.where(mask, product.astype(out.dtype), old)
    return lax.dynamic_update_slice_in_dim(out, new, start, 0)


def _accumulate(total: Array, product: Array, expert: Array) -> Array:
    return lax.dynamic_update_index_in_dim(total, _expert(total, expert) + product, expert, 0)
