"""The order in which a grouped product's kernel visits tiles of rows: which tile, which expert.

Tiles have a fixed height and fixed places. A visit is one tile and the part of one group inside
it, so a group is cut where tiles are and a tile is visited once for every group in it: at most
tiles + experts visits in all. The tables come from shapes and group sizes alone, in a few vector
operations over that many integers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Visit i of core c stands at c * bound + i of each table; both cores take `steps` visits.

    Rows low .. high - 1 of the tile belong to the expert; `first` marks the visit that opens an
    output block. Past a core's own visits its last one is repeated without rows.
    """

    expert: Int[Array, "cores*bound"]
    tile: Int[Array, "cores*bound"]
    low: Int[Array, "cores*bound"]
    high: Int[Array, "cores*bound"]
    first: Int[Array, "cores*bound"]
    steps: Int[Array, ""]
    cores: int = dataclasses.field(metadata={"static": True})

    @property
    def bound(self) -> int:
        """The most visits a core may have."""
        return self.expert.shape[0] // self.cores

    def tables(self) -> tuple[Array, ...]:
        """The arrays that a kernel reads as scalars."""
        return self.expert, self.tile, self.low, self.high, self.first


def by_tile(group_sizes: Int[Array, "E"], rows: int, height: int) -> Visits:
    """Visits for an output of rows: every tile is opened once, also one in which no group is.

    The tiles are halved between the cores of a chip that has two.
    """
    tiles = -(-rows // height)
    starts, ends = _bounds(group_sizes, rows)
    counts = jnp.where(ends > starts, -(-ends // height) - starts // height, 0)
    # One more group without rows opens the tiles past all others.
    covered = -(-ends[-1] // height)
    starts, ends = jnp.append(starts, covered * height), jnp.append(ends, 0)
    counts = jnp.append(counts, tiles - covered)
    cores = min(2, tiles)
    group, tile = _places(counts, starts // height, tiles + group_sizes.shape[0])
    own = jnp.sum((tile < -(-tiles // cores)) & (group < counts.shape[0]), dtype=jnp.int32)
    last_full = jnp.max(jnp.where(group_sizes > 0, jnp.arange(group_sizes.shape[0]), 0))
    visits = _cut(group, tile, (starts, ends, height), tile, (own, jnp.sum(counts), cores))
    return dataclasses.replace(visits, expert=jnp.minimum(visits.expert, last_full))


def by_expert(group_sizes: Int[Array, "E"], rows: int, height: int) -> Visits:
    """Visits for an output of experts: each is opened once, an empty one by a visit without rows.

    The experts are halved between two cores where the rows, with a tenth of a thousand for opening
    and writing a matrix, are halved.
    """
    starts, ends = _bounds(group_sizes, rows)
    counts = jnp.where(ends > starts, -(-ends // height) - starts // height, 1)
    experts = group_sizes.shape[0]
    cores = min(2, experts)
    places = jnp.where(ends > starts, starts // height, 0)
    group, tile = _places(counts, places, -(-rows // height) + experts)
    cost = jnp.cumsum(ends - starts + 100, dtype=jnp.int32)
    half = jnp.clip(jnp.searchsorted(cost, cost[-1] // 2), 1, max(experts - 1, 1))
    own = jnp.cumsum(counts, dtype=jnp.int32)[half - 1]
    return _cut(group, tile, (starts, ends, height), group, (own, jnp.sum(counts), cores))


def _bounds(group_sizes: Int[Array, "E"], rows: int) -> tuple[Array, Array]:
    """First row of each group and first row past it; sizes past the rows are cut off."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def _places(counts: Array, first_tile: Array, bound: int) -> tuple[Array, Array]:
    """Group and tile of each of `bound` visits, counts[g] of them for group g; past the last one
    the group is one that does not exist."""
    stops = jnp.cumsum(counts, dtype=jnp.int32)
    visit = jnp.arange(bound, dtype=jnp.int32)
    group = jnp.searchsorted(stops, visit, side="right").astype(jnp.int32)
    known = jnp.minimum(group, counts.shape[0] - 1)
    return group, first_tile[known] + visit - (stops - counts)[known]


def _cut(
    group: Array,
    tile: Array,
    rows: tuple[Array, Array, int],
    output: Array,
    split: tuple[Array, Array, int],
) -> Visits:
    """The tables of both cores: the first `own` visits are the first core's."""
    (starts, ends, height), (own, total, cores) = rows, split
    bound = group.shape[0]
    begins = jnp.stack([jnp.int32(0), own])[:cores, None]
    counts = jnp.stack([own, total - own])[:cores, None] if cores > 1 else total[None, None]
    index = jnp.arange(bound, dtype=jnp.int32)[None]
    live = index < counts
    visit = (begins + jnp.minimum(index, counts - 1)).reshape(-1)
    expert = jnp.minimum(group[visit], starts.shape[0] - 1)
    inside = lambda row: jnp.clip(row - tile[visit] * height, 0, height)
    low = inside(starts[expert])
    high = jnp.where(live.reshape(-1), inside(ends[expert]), low)
    before = output[jnp.maximum(visit - 1, 0)]
    opens = (index == 0).reshape(1, -1) | (output[visit] != before).reshape(cores, bound)
    as_int = lambda array: array.reshape(-1).astype(jnp.int32)
    return Visits(
        as_int(expert),
        as_int(tile[visit]),
        as_int(low),
        as_int(jnp.maximum(high, low)),
        as_int(opens & live),
        jnp.max(counts).astype(jnp.int32),
        cores,
    )
