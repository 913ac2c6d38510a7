"""Attention of a few queries, as in decoding: one loop over key blocks for all rows and kv heads.

Scores are [rows of a kv head, keys]: with a handful of rows the long axis has to be the innermost.
Over pages a row costs what it holds itself: where rows are many, those that end early leave the
loop (`_longest_first`), and what a row has past its end is never read.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.keys import Dense, Paged
from pallas_kernels.attention.masks import Masks

MOST_ROWS = 64  # tokens * heads of a kv head; above it, blocks of queries are faster
BLOCK = 256  # keys; a cache costs its filled part rounded up to it
LOWEST = -1e30  # below every score, and finite: LOWEST - LOWEST is 0 where -inf - -inf is NaN
# So few rows of pages always stay together; more go on as a quarter of them where the others have
# ended. Every such loop is compiled, so a factor of 2 would cost more than it saves.
_TOGETHER, _FACTOR = 4, 4

# Largest score, sum of weights and weighted values: [B K R 1], [B K R 1], [B K R C], float32.
Sums = tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes."""

    tokens: int
    groups: int  # heads of a kv head
    width: int  # keys of a block
    causal: bool


def forward(
    q: Float[Array, "B T H C"], keys: Dense | Paged, masks: Masks, *, causal: bool
) -> tuple[Float[Array, "B T H C"], Float[Array, "B K R"]]:
    """Outputs, and the float32 logsumexp of scores: +inf where a query sees nothing."""
    batch, tokens, heads, channels = q.shape
    plan = _Plan(tokens, heads // keys.heads, keys.width(BLOCK), causal)
    rows = q.reshape(batch, tokens, keys.heads, plan.groups, channels).astype(jnp.float32)
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, keys.heads, -1, channels)
    rows *= channels**-0.5
    keys, masks = keys.padded(plan.width), masks.filled(batch, tokens)
    ends = _ends(masks, plan, keys.count)
    blocks = (ends + plan.width - 1) // plan.width
    if isinstance(keys, Paged):
        sums = _longest_first(rows, keys.until(ends), masks, blocks, plan)
    else:
        step = _step(rows, keys, masks, plan)
        sums = lax.fori_loop(0, jnp.max(blocks), step, _nothing(rows))
    largest, total, out = sums
    seen = total > 0
    total = jnp.where(seen, total, 1)
    logsumexp = jnp.where(seen, largest + jnp.log(total), jnp.inf)[..., 0]
    out = (out / total).reshape(batch, keys.heads, tokens, plan.groups, channels)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype), logsumexp


def _nothing(rows: Float[Array, "B K R C"]) -> Sums:
    """The sums over no keys."""
    line = jnp.zeros_like(rows[..., :1])
    return jnp.full_like(line, LOWEST), line, jnp.zeros_like(rows)


def _longest_first(
    rows: Float[Array, "B K R C"],
    keys: Paged,
    masks: Masks,
    blocks: Int[Array, "B"],
    plan: _Plan,
) -> Sums:
    """Each row's sums over its own blocks: the longest rows stand first, and where most of the
    others have ended, a loop of fewer rows goes on."""
    count, sums = len(blocks), _nothing(rows)
    if count <= _TOGETHER or keys.count == plan.width:  # all rows end in one block
        return lax.fori_loop(0, jnp.max(blocks), _step(rows, keys, masks, plan), sums)
    order = jnp.argsort(-blocks)
    rows, keys, masks, blocks = rows[order], keys.taken(order), masks.taken(order), blocks[order]
    low = jnp.int32(0)
    while count:
        fewer = -(-count // _FACTOR) if count > _TOGETHER else 0
        high = blocks[fewer]  # the rows that go on no more have ended there
        step = _step(rows[:count], keys.taken(slice(count)), masks.taken(slice(count)), plan)
        some = lax.fori_loop(low, high, step, tuple(a[:count] for a in sums))
        sums = tuple(jnp.concatenate([new, a[count:]]) for new, a in zip(some, sums, strict=True))
        low, count = high, fewer
    back = jnp.argsort(order)
    return tuple(a[back] for a in sums)


def _step(
    rows: Float[Array, "B K R C"], keys: Dense | Paged, masks: Masks, plan: _Plan
) -> Callable[[Array, Sums], Sums]:
    """What a block of keys adds to the sums."""

    def step(block: Array, sums: Sums) -> Sums:
        largest, total, out = sums
        # The last block of keys moves up to end with them; the mask leaves out what it repeats.
        key = jnp.minimum(block * plan.width, keys.count - plan.width)
        k_block, v_block = keys.of_rows(key, plan.width)
        scores = jnp.einsum("bkrc,bskc->bkrs", rows, k_block)
        visible = _visible(masks, key, block * plan.width, plan)
        scores = jnp.where(visible, scores, -jnp.inf)
        # 0 times NaN is NaN: what lies past a cache's length may be anything.
        seen = jnp.any(visible, axis=(1, 2))[..., None, None]
        v_block = jnp.where(seen, v_block, 0)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, decay = jnp.exp(scores - new), jnp.exp(largest - new)
        total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
        return new, total, out * decay + jnp.einsum("bkrs,bskc->bkrc", weights, v_block)

    return step


def _ends(masks: Masks, plan: _Plan, keys: int) -> Int[Array, "B"]:
    """How many keys the query of each row that sees most of them sees."""
    real = jnp.minimum(masks.lengths, plan.tokens)
    seen = masks.offset + real if plan.causal else keys
    return jnp.minimum(jnp.where(real > 0, seen, 0), keys)


def _visible(masks: Masks, key: Array, first: Array, plan: _Plan) -> Bool[Array, "B 1 R keys"]:
    """Which keys from `key` on each row sees; those before `first` belong to the block before."""
    query = jnp.arange(plan.tokens * plan.groups, dtype=jnp.int32)[None, :, None] // plan.groups
    keys = key + jnp.arange(plan.width, dtype=jnp.int32)
    visible = (keys >= first) & (query < masks.lengths[:, None, None])
    if plan.causal:
        visible &= keys <= masks.offset[:, None, None] + query
    if masks.segment_ids is not None:
        own = jnp.repeat(masks.segment_ids, plan.groups, axis=1)[..., None]
        theirs = lax.dynamic_slice_in_dim(masks.kv_segment_ids, key, plan.width, axis=1)
        visible &= own == theirs[:, None]
    return visible[:, None]
