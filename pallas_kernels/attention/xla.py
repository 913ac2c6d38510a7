"""Blocked online softmax in plain XLA: memory linear in tokens, work only where a query sees keys.

The G = H / K query heads of a kv head are stacked: R = block_q * G columns of every product. Scores
stay transposed, [keys, R]: maxima and sums then run down the columns, which vectorises where along
a row it would not, and every matrix product has a wide right side although C is small.
For one block of queries a first loop takes wide blocks of keys that every query sees, without masks
if there are no segments; a second one takes narrow blocks with masks up to the diagonal. Trip
counts depend on positions, so blocks above the diagonal and past a cache's filled part are free.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.keys import Dense, Paged
from pallas_kernels.attention.masks import Masks

# Columns of a product, keys of a block without masks and keys of one with them; measured in
# docs/performance.md. Longer rows have relatively less work at the diagonal.
SHORT, LONG, LONG_KEYS = (256, 128, 32), (2048, 512, 256), 2048
FEWEST_QUERIES = 16  # of a block, however many heads share a kv head
LOWEST = -1e30  # below every score, and finite: LOWEST - LOWEST is 0 where -inf - -inf is NaN


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes; a job is one block of queries of one row and the heads of one kv head."""

    block_q: int
    wide: int  # 0 where there are fewer keys than a wide block
    narrow: int
    query_blocks: int
    groups: int
    causal: bool


@dataclasses.dataclass(frozen=True)
class _Scope:
    """The masks, and with segments the first key that each block of queries may see."""

    masks: Masks
    first_key: Int[Array, "B blocks"] | None


@dataclasses.dataclass(frozen=True)
class _Job:
    """Where a job stands: its row, kv head and first query."""

    row: Int[Array, ""]
    kv_head: Int[Array, ""]
    query: Int[Array, ""]


def forward(
    q: Float[Array, "B T H C"], keys: Dense | Paged, masks: Masks, *, causal: bool
) -> tuple[Float[Array, "B T H C"], Float[Array, "B K R"]]:
    """Outputs, and for `backward` the float32 logsumexp: +inf where a query sees nothing."""
    plan = _plan(q, keys, causal)
    keys, masks = keys.padded(plan.wide or plan.narrow), masks.filled(*q.shape[:2])
    grouped, scope = _grouped(q, plan), _scope(masks, keys.count, plan)
    scale = q.shape[-1] ** -0.5

    def job(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, logsumexp = carry
        at = _job(index, plan, keys)
        columns = _columns(grouped, at, plan) * scale
        o, sums = _online_softmax(columns, keys, scope, at, plan)
        out = lax.dynamic_update_slice(
            out, _uncolumns(o, plan).astype(out.dtype), (at.row, at.query, at.kv_head, 0, 0)
        )
        start = (at.row, at.kv_head, at.query * plan.groups)
        return out, lax.dynamic_update_slice(logsumexp, sums, start)

    lines = grouped.shape[1] * plan.groups
    logsumexp = jnp.zeros((q.shape[0], keys.heads, lines), jnp.float32)
    jobs = _num_jobs(plan, keys)
    out, logsumexp = lax.fori_loop(0, jobs, job, (jnp.zeros_like(grouped), logsumexp))
    return _ungrouped(out, q.shape), logsumexp


def backward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    masks: Masks,
    results: tuple[Float[Array, "B T H C"], Float[Array, "B K R"]],
    dout: Float[Array, "B T H C"],
    *,
    causal: bool,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    """Gradients of q, k and v, summed in float32, from what `forward` returned.

    Scores are computed again block by block.
    """
    out, logsumexp = results
    keys, masks = Dense(k, v), masks.filled(*q.shape[:2])
    plan = _plan(q, keys, causal)
    scope = _scope(masks, keys.count, plan)
    grouped_q, grouped_out, grouped_dout = (_grouped(a, plan) for a in (q, out, dout))
    scale = q.shape[-1] ** -0.5

    def job(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        at = _job(index, plan, keys)
        columns = _columns(grouped_q, at, plan) * scale
        dcolumns = _columns(grouped_dout, at, plan)
        rows, drows = _turned(columns), _turned(dcolumns)
        delta = jnp.sum(dcolumns * _columns(grouped_out, at, plan), axis=2, keepdims=True)
        start = (at.row, at.kv_head, at.query * plan.groups)
        sums = lax.dynamic_slice(logsumexp, start, (1, 1, columns.shape[-1]))[:, :, None]

        def step(ks: Array, vs: Array, mask: Array | None, key: Array, carry: Any) -> Any:
            dqueries, dk, dv = carry
            weights = jnp.exp(_masked(_dot(ks, columns, 3, 2), mask) - sums)
            dscores = weights * (_dot(vs, dcolumns, 3, 2) - delta)
            dqueries = dqueries + _dot(_turned(ks), dscores, 3, 2)
            dk = _add(dk, _dot(dscores, rows, 3, 2), at, key)
            return dqueries, dk, _add(dv, _dot(weights, drows, 3, 2), at, key)

        first = (jnp.zeros_like(columns), dk, dv)
        dqueries, dk, dv = _over_keys(step, first, keys, scope, at, plan)
        dqueries = _uncolumns(dqueries * scale, plan).astype(dq.dtype)
        dq = lax.dynamic_update_slice(dq, dqueries, (at.row, at.query, at.kv_head, 0, 0))
        return dq, dk, dv

    zeros = (
        jnp.zeros_like(grouped_q),
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
    )
    dq, dk, dv = lax.fori_loop(0, _num_jobs(plan, keys), job, zeros)
    return _ungrouped(dq, q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _online_softmax(
    columns: Float[Array, "1 1 C R"], keys: Dense | Paged, scope: _Scope, at: _Job, plan: _Plan
) -> tuple[Float[Array, "1 1 C R"], Float[Array, "1 1 R"]]:
    """Outputs and logsumexp of one job's scaled queries."""

    def step(ks: Array, vs: Array, mask: Array | None, key: Array, carry: Any) -> Any:
        del key
        largest, out = carry
        scores = _masked(_dot(ks, columns, 3, 2), mask)
        new = jnp.maximum(largest, jnp.max(scores, axis=2, keepdims=True))
        weights = jnp.exp(scores - new)
        # A value of one, so that the product sums the weights too: their own pass reads them again.
        ones = jnp.ones_like(vs[..., :1])
        lines = _turned(jnp.concatenate([vs, ones], axis=3))
        return new, out * jnp.exp(largest - new) + _dot(lines, weights, 3, 2)

    line = columns[:, :, :1]
    zeros = jnp.zeros_like(jnp.concatenate([columns, line], axis=2))
    largest, out = _over_keys(step, (jnp.full_like(line, LOWEST), zeros), keys, scope, at, plan)
    out, total = out[:, :, :-1], out[:, :, -1:]
    # Wide blocks are not masked, so padding beside real queries has summed something there.
    seen = (total > 0) & (_queries(at, plan) < scope.masks.lengths[at.row])
    total = jnp.where(seen, total, 1)
    logsumexp = jnp.where(seen, largest + jnp.log(total), jnp.inf)
    return jnp.where(seen, out / total, 0), logsumexp[:, :, 0]


def _over_keys(
    step: Callable[..., Any],
    carry: Any,
    keys: Dense | Paged,
    scope: _Scope,
    at: _Job,
    plan: _Plan,
) -> Any:
    """Folds `step(keys, values, mask, first key, carry)` over the key blocks that a job sees."""
    first, whole, end = _key_range(keys.count, scope, at, plan)

    def loop(width: int, low: Array, high: Array, mask_all: bool, carry: Any) -> Any:
        def body(block: Array, carry: Any) -> Any:
            # The last block of keys moves up to end with them; the mask leaves out what it repeats.
            key = jnp.minimum(block * width, keys.count - width)
            ks, vs = keys.of_head(at.row, at.kv_head, key, width)
            mask = _mask(scope.masks, at, key, block * width, width, plan) if mask_all else None
            if mask is not None:
                # 0 times NaN is NaN: what lies past a cache's length may be anything.
                seen = jnp.any(mask, axis=1)[:, None]
                ks, vs = (jnp.where(seen, a, 0) for a in (ks, vs))
            return step(ks, vs, mask, key, carry)

        return lax.fori_loop(low, high, body, carry)

    start = first
    if plan.wide:
        blocks = whole // plan.wide
        has_segments = scope.first_key is not None
        carry = loop(plan.wide, first // plan.wide, blocks, has_segments, carry)
        start = jnp.maximum(first, blocks * plan.wide)
    return loop(plan.narrow, start // plan.narrow, -(-end // plan.narrow), True, carry)


def _key_range(
    keys: int, scope: _Scope, at: _Job, plan: _Plan
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """First key that a job may see, how many all its queries see, and the end of what any sees."""
    masks = scope.masks
    last = jnp.minimum(at.query + plan.block_q, masks.lengths[at.row])
    if plan.causal:
        offset = masks.offset[at.row]
        whole = jnp.minimum(offset + at.query + 1, keys)
        end = jnp.minimum(offset + last, keys)
    else:
        whole = end = jnp.int32(keys)
    end = jnp.where(last > at.query, end, 0)  # a block of padding sees nothing
    first = jnp.int32(0)
    if scope.first_key is not None:
        first = scope.first_key[at.row, at.query // plan.block_q]
    return first, jnp.minimum(whole, end), end


def _mask(
    masks: Masks, at: _Job, key: Array, first: Array, width: int, plan: _Plan
) -> Bool[Array, "keys R"]:
    """Which keys of a block each column sees; keys before `first` belong to the block before."""
    keys = (key + jnp.arange(width, dtype=jnp.int32))[:, None]
    query = _queries(at, plan)
    visible = (keys >= first) & (query < masks.lengths[at.row])
    if plan.causal:
        visible &= keys <= masks.offset[at.row] + query
    if masks.segment_ids is not None:
        own = lax.dynamic_slice(masks.segment_ids, (at.row, at.query), (1, plan.block_q))
        theirs = lax.dynamic_slice(masks.kv_segment_ids, (at.row, key), (1, width))
        visible &= jnp.repeat(own[0], plan.groups) == theirs[0][:, None]
    return visible


def _queries(at: _Job, plan: _Plan) -> Int[Array, "R"]:
    """The query that each column belongs to."""
    return at.query + jnp.arange(plan.block_q * plan.groups, dtype=jnp.int32) // plan.groups


def _masked(scores: Array, mask: Array | None) -> Array:
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _plan(q: Array, keys: Dense | Paged, causal: bool) -> _Plan:
    """Block sizes for these shapes."""
    _, tokens, heads, _ = q.shape
    groups = heads // keys.heads
    columns, wide, narrow = LONG if keys.count >= LONG_KEYS else SHORT
    block_q = min(tokens, max(FEWEST_QUERIES, columns // groups))
    narrow = keys.width(narrow)
    return _Plan(
        block_q=block_q,
        wide=0 if keys.count < wide else max(wide // narrow, 1) * narrow,
        narrow=narrow,
        query_blocks=-(-tokens // block_q),
        groups=groups,
        causal=causal,
    )


def _num_jobs(plan: _Plan, keys: Dense | Paged) -> int:
    return plan.query_blocks * keys.rows * keys.heads


def _job(index: Array, plan: _Plan, keys: Dense | Paged) -> _Job:
    pair, block = index // plan.query_blocks, index % plan.query_blocks
    return _Job(pair // keys.heads, pair % keys.heads, block * plan.block_q)


def _grouped(q: Float[Array, "B T H C"], plan: _Plan) -> Float[Array, "B padded K G C"]:
    """Heads split by kv head, and tokens padded with zeros to whole blocks."""
    batch, tokens, heads, channels = q.shape
    padding = plan.query_blocks * plan.block_q - tokens
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else q
    return q.reshape(batch, tokens + padding, heads // plan.groups, plan.groups, channels)


def _ungrouped(out: Float[Array, "B padded K G C"], shape: tuple[int, ...]) -> Array:
    return out[:, : shape[1]].reshape(shape)


def _scope(masks: Masks, keys: int, plan: _Plan) -> _Scope:
    """Masks with segment ids as long as the padded queries, and where each block's keys begin."""
    if masks.segment_ids is None:
        return _Scope(masks, None)
    tokens = masks.segment_ids.shape[1]
    padding = ((0, 0), (0, plan.query_blocks * plan.block_q - tokens))
    masks = dataclasses.replace(masks, segment_ids=jnp.pad(masks.segment_ids, padding, mode="edge"))
    return _Scope(masks, _first_keys(masks, keys, plan))


def _first_keys(masks: Masks, keys: int, plan: _Plan) -> Int[Array, "B blocks"]:
    """A multiple of narrow blocks before which no key shares a segment with a block of queries.

    It compares ranges of ids: any order of ids is right, and rising ids skip earlier documents.
    """
    low, high = _id_range(masks.segment_ids, masks.lengths, plan.block_q)
    padding = ((0, 0), (0, -keys % plan.narrow))
    ids = jnp.pad(masks.kv_segment_ids, padding, mode="edge")
    key_low, key_high = _id_range(ids, jnp.full_like(masks.lengths, ids.shape[1]), plan.narrow)
    overlap = (key_low[:, None] <= high[..., None]) & (key_high[:, None] >= low[..., None])
    return jnp.argmax(overlap, axis=-1).astype(jnp.int32) * plan.narrow


def _id_range(
    ids: Int[Array, "B T"], lengths: Int[Array, "B"], width: int
) -> tuple[Int[Array, "B blocks"], Int[Array, "B blocks"]]:
    """Smallest and largest id of each block of `width`, padding left out."""
    limits = jnp.iinfo(ids.dtype)
    real = jnp.arange(ids.shape[1]) < lengths[:, None]
    blocks = (ids.shape[0], -1, width)
    low = jnp.min(jnp.where(real, ids, limits.max).reshape(blocks), axis=-1)
    return low, jnp.max(jnp.where(real, ids, limits.min).reshape(blocks), axis=-1)


def _columns(grouped: Array, at: _Job, plan: _Plan) -> Float[Array, "1 1 C R"]:
    """A job's queries as float32 columns, token-major and the heads of a group side by side."""
    size = (1, plan.block_q, 1, plan.groups, grouped.shape[-1])
    block = lax.dynamic_slice(grouped, (at.row, at.query, at.kv_head, 0, 0), size)
    block = block.astype(jnp.float32).transpose(0, 2, 4, 1, 3)
    return block.reshape(*block.shape[:3], plan.block_q * plan.groups)


def _uncolumns(columns: Float[Array, "1 1 C R"], plan: _Plan) -> Float[Array, "1 q 1 G C"]:
    blocks = columns.reshape(*columns.shape[:3], plan.block_q, plan.groups)
    return blocks.transpose(0, 3, 1, 4, 2)


def _add(total: Float[Array, "B S K C"], block: Array, at: _Job, key: Array) -> Array:
    """`total` with a [1, 1, keys, C] block added at a job's row and kv head."""
    block = block.swapaxes(1, 2)
    start = (at.row, key, at.kv_head, 0)
    return lax.dynamic_update_slice(
        total, lax.dynamic_slice(total, start, block.shape) + block, start
    )


def _turned(array: Float[Array, "1 1 m n"]) -> Float[Array, "1 1 n m"]:
    """The transpose, made: a CPU's product of one that is only read so takes half as long again."""
    return lax.optimization_barrier(array.swapaxes(2, 3))


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Product over one axis of each, for every row and kv head, in float32."""
    axes = (((left_axis,), (right_axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
