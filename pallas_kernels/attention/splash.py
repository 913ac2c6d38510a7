"""Attention of whole rows on TPU, by the splash attention kernel that comes with JAX.

Its grid skips what causality hides; segments are masked inside. Nothing here but what this op's
contract adds: scaled scores, rows of any length, and zeros for padding.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from pallas_kernels.attention.masks import Masks

LANES = 128  # tokens of the smallest block, and the channels that fill a register
BLOCKS = (512, 256, LANES)  # tokens of a block of queries and of keys: the largest that divides


def forward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    masks: Masks,
    *,
    causal: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H C"], Callable[..., Any]]:
    """Outputs, and the function from their cotangent to those of q, k and v."""
    return jax.vjp(lambda *qkv: outputs(*qkv, masks, causal=causal, interpret=interpret), q, k, v)


def backward(
    pullback: Callable[..., Any], dout: Float[Array, "B T H C"], *, causal: bool
) -> tuple[Array | None, ...]:
    """Cotangents of q, k and v; none of the masks."""
    return *pullback(dout), None


def outputs(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    masks: Masks,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """Causal attention of whole rows, in q's dtype."""
    (batch, tokens, heads, _), fill = q.shape, -q.shape[1] % LANES
    masks = masks.filled(batch, tokens)
    padded = tokens + fill
    block = next(size for size in BLOCKS if padded % size == 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def rows(array: Array) -> Array:  # [B T heads C] -> [B heads padded C]
        padding = ((0, 0), (0, fill), (0, 0), (0, 0))
        return jnp.swapaxes(jnp.pad(array, padding) if fill else array, 1, 2)

    queries, keys = _scaled(q, k)
    operands = [rows(queries), rows(keys), rows(v)]
    if masks.segment_ids is not None:
        ids = jnp.pad(masks.segment_ids, ((0, 0), (0, fill)), mode="edge")
        operands.append(splash.SegmentIds(q=ids, kv=ids))
    out = jnp.swapaxes(jax.vmap(kernel)(*operands), 1, 2)[:, :tokens]
    valid = jnp.arange(tokens) < masks.lengths[:, None]
    return jnp.where(valid[..., None, None], out, 0).astype(q.dtype)


def _scaled(q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and keys whose products are q kᵀ / sqrt(C), no query rounded.

    C^-1/2 that is a power of two only moves exponents. By another one a rounded query is off by
    2^-9 of itself, and so is a score: 0.4 at 200. Queries are then two numbers of their dtype, the
    rest beside the number, each with the same key: twice the channels.
    """
    scale = q.shape[-1] ** -0.5
    if math.frexp(scale)[0] == 0.5:
        return q * jnp.asarray(scale, q.dtype), k
    exact = q.astype(jnp.float32) * scale
    first = exact.astype(q.dtype)
    rest = (exact - first.astype(jnp.float32)).astype(q.dtype)
    return jnp.concatenate([first, rest], axis=-1), jnp.concatenate([k, k], axis=-1)


def unsupported(q: Array, k: Array, v: Array, masks: Masks, *, causal: bool) -> str | None:
    """Why these operands cannot run, or None: whole causal rows in bfloat16 that fill registers."""
    if not causal or masks.offset is not None or q.shape[1] != k.shape[1]:
        return "it takes causal rows without a cache"
    if {a.dtype for a in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; it takes bfloat16"
    if q.shape[3] % LANES:
        return f"C={q.shape[3]}; it takes multiples of {LANES} channels"
    if masks.segment_ids is not None and masks.kv_segment_ids is not masks.segment_ids:
        return "kv_segment_ids are given; it takes one set of ids for queries and keys"
    return None
