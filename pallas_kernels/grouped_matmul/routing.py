"""Order of routed rows: tokens sorted by expert and combined back, by gathers alone.

Each token has R entries, one for each of its experts; an entry becomes a row of the sorted order.
Both directions and both derivatives read through a permutation or its inverse, so no value is
scattered and sums have one order: results are deterministic.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

COUNT_ROWS = 128  # tokens that one product counts; a matrix unit is 128 wide or 256
UNROLLED = 6  # choices; with more, one gather in a loop compiles sooner than as many gathers
LARGEST_KEY = np.iinfo(np.int32).max  # expert and entry share one word up to here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertOrder:
    """Entries sorted by expert, those of one expert by token; entries without one come last.

    Where groups are aligned, each is filled up with rows that hold no entry and are zeros.
    """

    row_entry: Int[Array, "rows"]  # the entry (token * R + choice) that each row holds
    holds: Bool[Array, "rows"]  # whether a row holds an entry that has an expert; others are zeros
    entry_row: Int[Array, "tokens R"]  # the row of each entry
    group_sizes: Int[Array, "E"]  # rows of each expert, filling included; past their sum are none
    load: Int[Array, "E"]  # entries of each expert

    @property
    def row_token(self) -> Int[Array, "rows"]:
        """The token that each row holds."""
        return self.row_entry // self.entry_row.shape[1]

    @property
    def routed(self) -> Bool[Array, "tokens R"]:
        """Which entries have an expert."""
        return self.entry_row < jnp.sum(self.group_sizes)


def sort_by_expert(
    expert_index: Int[Array, "tokens R"],
    num_experts: int,
    valid: Bool[Array, "tokens"] | None = None,
    *,
    align: int = 1,
) -> ExpertOrder:
    """The order in which each expert's rows are consecutive.

    An entry has no expert, and no row in any group, if its index lies outside 0 .. num_experts - 1
    (an expert of another device) or its token is not `valid` (padding). The sort is stable. Groups
    are filled up to multiples of `align` rows, so there are up to align - 1 more for each expert.
    """
    tokens, choices = expert_index.shape
    known = (expert_index >= 0) & (expert_index < num_experts)
    if valid is not None:
        known &= valid[:, None]
    key = jnp.where(known, expert_index, num_experts).astype(jnp.int32)
    # A sort of all entries takes a TPU's compiler nine seconds, and a step has several.
    arrays = jax.lax.platform_dependent(
        key,
        cpu=lambda key: _by_sorting(key, num_experts, align),
        default=lambda key: _by_counting(key, num_experts, align),
    )
    return ExpertOrder(*arrays)


def _by_sorting(key: Int[Array, "tokens R"], num_experts: int, align: int) -> tuple[Array, ...]:
    """The arrays of an `ExpertOrder`, by a sort; entries of expert `num_experts` have none."""
    rows = key.size
    flat = key.reshape(rows)
    entry = jnp.arange(rows, dtype=jnp.int32)
    if (num_experts + 1) * rows <= LARGEST_KEY:
        # One sort of one operand, seven times faster on a CPU than a stable sort of two.
        row_entry = jnp.sort(flat * rows + entry) % rows
    else:
        row_entry = jax.lax.sort((flat, entry), num_keys=1, is_stable=True)[1]
    load = jnp.zeros(num_experts + 1, jnp.int32).at[flat].add(1)[:num_experts]
    if align > 1:
        return _aligned(row_entry, flat, load, align, key.shape)
    entry_row = jnp.zeros(rows, jnp.int32).at[row_entry].set(entry, unique_indices=True)
    return row_entry, entry < jnp.sum(load), entry_row.reshape(key.shape), load, load


def _by_counting(key: Int[Array, "tokens R"], num_experts: int, align: int) -> tuple[Array, ...]:
    """The arrays of an `ExpertOrder` without a sort.

    An entry's row is its expert's first row and how many of the expert's entries come before it.
    Counts are exact: in bfloat16 of one token's choices, up to 256, and in float32 of all.
    """
    (tokens, choices), count = key.shape, key.size
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    chosen = key[:, :, None] == experts  # never made: what reads it compares anew
    ones = jnp.sum(chosen, axis=1, dtype=jnp.bfloat16)
    height = min(COUNT_ROWS, tokens)
    blocks = jnp.pad(ones, ((0, -tokens % height), (0, 0))).reshape(-1, height, num_experts + 1)
    earlier = jnp.tril(jnp.ones((height, height), jnp.bfloat16), -1)
    inside = jnp.einsum("ij,bje->bie", earlier, blocks, preferred_element_type=jnp.float32)
    totals = jnp.sum(blocks, axis=1, dtype=jnp.float32)
    before = inside + (jnp.cumsum(totals, axis=0) - totals)[:, None]
    before = before.reshape(-1, num_experts + 1)[:tokens].astype(jnp.int32)
    load = jnp.sum(totals, axis=0).astype(jnp.int32)
    sizes = -(-load[:-1] // align) * align
    starts = jnp.append(0, jnp.cumsum(sizes, dtype=jnp.int32))  # those without an expert are last
    first = jnp.sum(jnp.where(chosen, (starts + before)[:, None], 0), axis=2)
    own = jnp.tril(jnp.ones((choices, choices), bool), -1)  # a token may name an expert twice
    twice = jnp.sum((key[:, :, None] == key[:, None, :]) & own, axis=2, dtype=jnp.int32)
    entry_row = first + twice
    rows = _aligned_rows(count, num_experts, align)
    entry = jnp.arange(count, dtype=jnp.int32)
    place = entry_row.reshape(count)
    # One scatter, of 32 bits: one of bool takes the compiler six seconds more.
    row_entry = jnp.full(rows, -1, jnp.int32).at[place].set(entry, unique_indices=True)
    holds = (row_entry >= 0) & (jnp.arange(rows) < starts[-1])
    row_entry = jnp.maximum(row_entry, 0)
    return row_entry, holds, entry_row, sizes, load[:-1]


def _aligned_rows(count: int, num_experts: int, align: int) -> int:
    rows = count + min(num_experts, count) * (align - 1)
    return rows + -rows % align


def _aligned(
    sorted_entry: Int[Array, "n"],
    key: Int[Array, "n"],
    load: Int[Array, "E"],
    align: int,
    shape: tuple[int, int],
) -> tuple[Array, ...]:
    """The order with every group moved down to a multiple of `align` rows."""
    count, num_experts = sorted_entry.shape[0], load.shape[0]
    sizes = -(-load // align) * align
    ends = jnp.cumsum(sizes)
    shift = jnp.append(ends - sizes - (jnp.cumsum(load) - load), ends[-1] - jnp.sum(load))
    place = jnp.arange(count, dtype=jnp.int32) + _take(shift, _take(key, sorted_entry))
    rows = _aligned_rows(count, num_experts, align)
    place = place.astype(jnp.int32)
    row_entry = jnp.zeros(rows, jnp.int32).at[place].set(sorted_entry, unique_indices=True)
    holds = jnp.zeros(rows, bool).at[place].set(place < ends[-1], unique_indices=True)
    entry_row = jnp.zeros(count, jnp.int32).at[sorted_entry].set(place, unique_indices=True)
    return row_entry, holds, entry_row.reshape(shape), sizes.astype(jnp.int32), load


@jax.custom_vjp
def gather_rows(x: Float[Array, "tokens L"], order: ExpertOrder) -> Float[Array, "rows L"]:
    """Each row's token, in expert order; zeros for rows without an expert."""
    return jnp.where(order.holds[:, None], _take(x, order.row_token), 0)


def _gather_rows_forward(x, order):
    return gather_rows(x, order), order


def _gather_rows_backward(order, drows):
    ones = jnp.ones(order.entry_row.shape, jnp.float32)
    return combine_rows(drows, ones, order), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine_rows(
    rows: Float[Array, "rows L"],
    weights: Float[Array, "tokens R"],
    order: ExpertOrder,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "tokens L"]:
    """Each token's weighted sum of its experts' rows, summed in float32 by choice; in `out_dtype`,
    or the rows'.

    Entries without an expert add nothing, and neither they nor their weights receive a gradient.
    """
    weights = jnp.where(order.routed, weights.astype(jnp.float32), 0)

    def add(total: Array, entry: Array, weight: Array) -> Array:
        return total + _take(rows, entry).astype(jnp.float32) * weight[:, None]

    total = jnp.zeros((), jnp.float32)
    if weights.shape[1] <= UNROLLED:
        for choice in range(weights.shape[1]):
            total = add(total, order.entry_row[:, choice], weights[:, choice])
    else:
        total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
        each = (order.entry_row.T, weights.T)
        total = jax.lax.scan(lambda total, one: (add(total, *one), None), total, each)[0]
    return total.astype(out_dtype or rows.dtype)


def _combine_rows_forward(rows, weights, order, out_dtype):
    return combine_rows(rows, weights, order, out_dtype), (rows, weights, order)


def _combine_rows_backward(out_dtype, residuals, dout):
    rows, weights, order = residuals
    routed = order.routed
    weights_f32 = weights.astype(jnp.float32).reshape(-1)
    row_weight = jnp.where(order.holds, _take(weights_f32, order.row_entry), 0)
    drows = _take(dout, order.row_token).astype(jnp.float32) * row_weight[:, None]
    product = lambda entry: jnp.sum(_take(rows, entry) * dout.astype(jnp.float32), axis=1)
    if weights.shape[1] <= UNROLLED:
        products = jnp.stack([product(entry) for entry in order.entry_row.T])
    else:
        products = jax.lax.map(product, order.entry_row.T)
    dweights = jnp.where(routed, products.T, 0)
    return drows.astype(rows.dtype), dweights.astype(weights.dtype), None


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)


def _take(array: Array, index: Int[Array, "n"]) -> Array:
    """array[index] for indices that are inside it by construction."""
    return array.at[index].get(mode="promise_in_bounds")
