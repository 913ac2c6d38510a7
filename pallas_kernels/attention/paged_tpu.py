"""Attention over pages on TPU, by the ragged paged attention kernel that comes with JAX.

It decodes, verifies drafts and reads chunks of prompts alike: a row's queries are the last tokens
of what its pages hold. Each row's own pages are fetched, two blocks at a time, and nothing else.
Here stands what this op's contract adds: rows that are padded, and zeros for their padding.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.masks import Masks

LANES = 128  # channels that fill a register
BLOCK_KEYS = 1024  # of a block of pages: 1 MB of fast memory each, twice, for Super in bfloat16
MOST_QUERIES = 32  # of a block; all of them are multiplied with each row's keys, so few for few


def outputs(
    q: Float[Array, "B T H C"],
    pool: Float[Array, "pages page 2K C"],
    pages: Int[Array, "B W"],
    masks: Masks,
) -> Float[Array, "B T H C"]:
    """Causal attention of T queries of each row over its pages, in q's dtype."""
    batch, tokens, heads, channels = q.shape
    padded, masks = masks.lengths is not None, masks.filled(batch, tokens)
    counts = jnp.minimum(masks.lengths, tokens)
    starts = jnp.pad(jnp.cumsum(counts), (1, 0)).astype(jnp.int32)
    queries = q.reshape(batch * tokens, heads, channels)
    if padded:  # the kernel wants the rows' own queries one after another
        place = jnp.arange(batch * tokens, dtype=jnp.int32)
        row = jnp.searchsorted(starts[1:], place, side="right")
        row = jnp.minimum(row, batch - 1)
        queries = queries[jnp.minimum(row * tokens + place - starts[row], batch * tokens - 1)]
    scale = 1.0 if pool.dtype != q.dtype else None  # with one it brings keys into q's dtype
    page = pool.shape[1]
    out = ragged.ragged_paged_attention(
        queries,
        pool,
        jnp.maximum(masks.offset + counts, 1),  # a row without keys would leave a fetch waiting
        pages,
        starts,
        jnp.full(1, batch, jnp.int32),
        sm_scale=channels**-0.5,
        k_scale=scale,
        v_scale=scale,
        num_kv_pages_per_block=min(pages.shape[1], max(1, BLOCK_KEYS // page)),
        num_queries_per_block=min(MOST_QUERIES, 1 << (tokens - 1).bit_length()),
    )
    if not padded:
        return out.reshape(q.shape)
    own = jnp.arange(tokens) < counts[:, None]
    at = jnp.where(own, starts[:-1, None] + jnp.arange(tokens), 0)
    return jnp.where(own[..., None, None], out[at], 0)


def unsupported(q: Array, pool: Array, pages: Array, masks: Masks) -> str | None:
    """Why these operands cannot run, or None."""
    del pages, masks
    kinds = ("float32", "bfloat16")
    if q.dtype.name not in kinds:
        return f"q is {q.dtype}; it takes {' or '.join(kinds)}"
    if pool.dtype.name not in (*kinds, "float8_e4m3fn", "float8_e5m2"):
        return f"the pages are {pool.dtype}; it takes float32, bfloat16 and FP8"
    if q.shape[3] % LANES:
        return f"C={q.shape[3]}; it takes multiples of {LANES} channels"
    words, left = divmod(pool.shape[2] * pool.dtype.itemsize, 4)
    if left or (words not in (1, 2, 4) and words % 8):
        return (
            f"K={pool.shape[2] // 2} kv heads in {pool.dtype}; keys and values of a token must "
            "fill 1, 2, 4 or a multiple of 8 words of 32 bits"
        )
    return None
