"""The tile table of a grouped matrix product: which rows and which expert each tile multiplies.

Tiles start at their group's first row, aligned to nothing else, so a group of n rows takes
ceil(n / block) of them and an empty group none. Their number is bounded by shapes alone; loops run
over the used ones only, which is why the cost does not grow with the number of experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SMALLEST, LARGEST = 8, 256  # rows of a tile; measured in docs/performance.md


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile i multiplies rows first[i] .. last[i] - 1 by expert[i]; tiles from `used` on mean nothing."""

    expert: Int[Array, "tiles"]
    first: Int[Array, "tiles"]
    last: Int[Array, "tiles"]
    used: Int[Array, ""]


def block_rows(rows: int, num_experts: int) -> int:
    """Rows of a tile: a power of two near the mean group, so that few tiles are mostly padding."""
    block = SMALLEST
    while block < LARGEST and 2 * block * num_experts <= rows:
        block *= 2
    return min(block, rows)


def tile_bound(rows: int, num_experts: int, block: int) -> int:
    """The most tiles that any group sizes over `rows` rows can take."""
    return rows // block + min(num_experts, rows)


def tile_table(group_sizes: Int[Array, "E"], rows: int, block: int) -> Tiles:
    """The tiles of consecutive groups; rows past the sum of the sizes belong to none."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    tile_ends = jnp.cumsum(-(-(ends - begins) // block), dtype=jnp.int32)
    tile = jnp.arange(tile_bound(rows, group_sizes.shape[0], block), dtype=jnp.int32)
    expert = jnp.searchsorted(tile_ends, tile, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, group_sizes.shape[0] - 1)
    # The group's last tile is tile_ends - 1, so counting back from there needs no second table.
    tiles_before = tile_ends[expert] - -(-(ends[expert] - begins[expert]) // block)
    first = begins[expert] + (tile - tiles_before) * block
    return Tiles(expert, first, jnp.minimum(first + block, ends[expert]), tile_ends[-1])


def window(
    tiles: Tiles, tile: Int[Array, ""], rows: int, block: int
) -> tuple[Int[Array, ""], Bool[Array, "block 1"]]:
    """First row of the block that holds the tile, moved up where it would pass the end, and its mask."""
    start = jnp.minimum(tiles.first[tile], rows - block)
    row = start + jnp.arange(block, dtype=jnp.int32)
    return start, ((row >= tiles.first[tile]) & (row < tiles.last[tile]))[:, None]
