"""The tile tables of a grouped product: which rows and which expert each tile multiplies.

Tiles start at their group's first row, aligned to nothing else. A group is cut into as many tiles
of the largest level as it fills more than half, then of the next, and the last level takes the
rest; an empty group has none. Loops run over the used tiles only, so the cost follows the rows and
does not grow with the number of experts; static bounds come from shapes alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

FEWEST_ROWS, MOST_ROWS = 4, 256  # of a tile's usual height; measured in docs/performance.md
# Below this many multiplications XLA's CPU backend runs a matrix product on one thread.
THREADED_PRODUCT = 2**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile i takes rows first[i] .. last[i] - 1 to expert[i]; tiles from `used` on mean nothing."""

    expert: Int[Array, "tiles"]
    first: Int[Array, "tiles"]
    last: Int[Array, "tiles"]
    used: Int[Array, ""]
    height: int = dataclasses.field(metadata={"static": True})  # rows read for each tile


def tile_heights(rows: int, num_experts: int, matrix: int) -> tuple[int, ...]:
    """Heights of the levels, falling, for experts of `matrix` elements.

    The usual height is a power of two near the mean group. Groups large enough get a level on which
    a product takes all threads, and one for the last rows, which would half fill a usual tile.
    """
    usual = FEWEST_ROWS
    while usual < MOST_ROWS and 2 * usual * num_experts <= rows:
        usual *= 2
    threaded = usual
    while threaded * matrix < THREADED_PRODUCT:
        threaded *= 2
    heights = [threaded] if usual < threaded <= 2 * rows // num_experts else []
    heights.append(usual)
    if usual >= 4 * 8:
        heights.append(max(8, usual // 8))
    return tuple(min(height, rows) for height in heights)


def tile_tables(
    group_sizes: Int[Array, "E"], rows: int, heights: tuple[int, ...]
) -> tuple[Tiles, ...]:
    """One table for each height; together they cover each group's rows once, and no other row."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    tables = []
    for height in heights[:-1]:
        filled = (ends - begins + (height - 1) // 2) // height
        stops = jnp.minimum(begins + filled * height, ends)
        tables.append(_table(begins, stops, rows, height))
        begins = stops
    return (*tables, _table(begins, ends, rows, heights[-1]))


def tile_bound(rows: int, num_experts: int, height: int) -> int:
    """The most tiles of one height that any group sizes over `rows` rows can take."""
    return rows // height + min(num_experts, rows)


def _table(begins: Int[Array, "E"], ends: Int[Array, "E"], rows: int, height: int) -> Tiles:
    """The tiles of the rows begins[e] .. ends[e] - 1 of every expert e."""
    counts = -(-(ends - begins) // height)
    tile_ends = jnp.cumsum(counts, dtype=jnp.int32)
    tile = jnp.arange(tile_bound(rows, begins.shape[0], height), dtype=jnp.int32)
    expert = jnp.searchsorted(tile_ends, tile, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, begins.shape[0] - 1)
    first = begins[expert] + (tile - (tile_ends - counts)[expert]) * height
    last = jnp.minimum(first + height, ends[expert])
    return Tiles(expert, first, last, tile_ends[-1], height)


def window(
    tiles: Tiles, tile: Int[Array, ""], rows: int
) -> tuple[Int[Array, ""], Bool[Array, "height 1"]]:
    """First of `height` rows that hold a tile, moved up from the end, and which are the tile's."""
    start = jnp.minimum(tiles.first[tile], rows - tiles.height)
    row = start + jnp.arange(tiles.height, dtype=jnp.int32)
    return start, ((row >= tiles.first[tile]) & (row < tiles.last[tile]))[:, None]
