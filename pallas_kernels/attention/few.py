"""Attention of a few queries, as in decoding: one loop over key blocks for all rows and kv heads.

Scores are [rows of a kv head, keys]: with a handful of rows the long axis has to be the innermost.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.masks import Masks

MOST_ROWS = 64  # tokens * heads of a kv head; above it, blocks of queries are faster
BLOCK = 256  # keys; a cache costs its filled part rounded up to it
LOWEST = -1e30  # below every score, and finite: LOWEST - LOWEST is 0 where -inf - -inf is NaN


def forward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    masks: Masks,
    *,
    causal: bool,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B K R"]]:
    """Outputs, and the float32 logsumexp of scores: +inf where a query sees nothing."""
    batch, tokens, heads, channels = q.shape
    keys, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    rows = q.reshape(batch, tokens, kv_heads, groups, channels).astype(jnp.float32)
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, tokens * groups, channels)
    rows *= channels**-0.5
    width = min(keys, BLOCK)

    def step(block: Array, carry: Any) -> Any:
        largest, total, out = carry
        # The last block of keys moves up to end with them; the mask leaves out what it repeats.
        key = jnp.minimum(block * width, keys - width)
        k_block, v_block = (
            lax.dynamic_slice_in_dim(a, key, width, axis=1).astype(jnp.float32) for a in (k, v)
        )
        scores = jnp.einsum("bkrc,bskc->bkrs", rows, k_block)
        visible = _visible(masks, key, block * width, (tokens, groups, width), causal)
        scores = jnp.where(visible, scores, -jnp.inf)
        # 0 times NaN is NaN: what lies past a cache's length may be anything.
        seen = jnp.any(visible, axis=(1, 2))[..., None, None]
        v_block = jnp.where(seen, v_block, 0)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, decay = jnp.exp(scores - new), jnp.exp(largest - new)
        total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
        return new, total, out * decay + jnp.einsum("bkrs,bskc->bkrc", weights, v_block)

    line = jnp.zeros_like(rows[..., :1])
    carry = jnp.full_like(line, LOWEST), line, jnp.zeros_like(rows)
    blocks = (_end(masks, tokens, keys, causal) + width - 1) // width
    largest, total, out = lax.fori_loop(0, blocks, step, carry)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    logsumexp = jnp.where(seen, largest + jnp.log(total), jnp.inf)[..., 0]
    out = (out / total).reshape(batch, kv_heads, tokens, groups, channels)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype), logsumexp


def _end(masks: Masks, tokens: int, keys: int, causal: bool) -> Int[Array, ""]:
    """How many keys the query that sees most of them sees."""
    real = jnp.minimum(masks.lengths, tokens)
    seen = masks.offset + real if causal else keys
    return jnp.minimum(jnp.max(jnp.where(real > 0, seen, 0)), keys)


def _visible(
    masks: Masks, key: Array, first: Array, sizes: tuple[int, int, int], causal: bool
) -> Bool[Array, "B 1 R keys"]:
    """Which keys from `key` on each row sees; those before `first` belong to the block before."""
    tokens, groups, width = sizes
    query = jnp.arange(tokens * groups, dtype=jnp.int32)[None, :, None] // groups
    keys = key + jnp.arange(width, dtype=jnp.int32)
    visible = (keys >= first) & (query < masks.lengths[:, None, None])
    if causal:
        visible &= keys <= masks.offset[:, None, None] + query
    if masks.segment_ids is not None:
        own = jnp.repeat(masks.segment_ids, groups, axis=1)[..., None]
        theirs = lax.dynamic_slice_in_dim(masks.kv_segment_ids, key, width, axis=1)
        visible &= own == theirs[:, None]
    return visible[:, None]
