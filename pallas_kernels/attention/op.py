"""Causal attention with grouped heads, segments and caches: contract, checks, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import few, paged_tpu, reference, splash, xla
from pallas_kernels.attention.keys import Dense, Paged
from pallas_kernels.attention.masks import Masks


def _definition(q, k, v, masks, *, causal):
    """The reference under the signature of an implementation; its backward needs no logsumexp."""
    out = reference.attention(
        q,
        k,
        v,
        segment_ids=masks.segment_ids,
        kv_segment_ids=masks.kv_segment_ids,
        lengths=masks.lengths,
        q_offset=masks.offset,
        causal=causal,
    )
    out = out.astype(q.dtype)
    return out, (q, k, v, masks)


def _definition_gradients(residuals, dout, *, causal):
    q, k, v, masks = residuals
    forward = lambda *qkv: _definition(*qkv, masks, causal=causal)[0]  # noqa: E731
    return *jax.vjp(forward, q, k, v)[1](dout), None


def _blocked(q, keys, masks, *, causal):
    """Decoding has a loop of its own; its logsumexp is laid out like that of whole blocks."""
    rows = q.shape[1] * (q.shape[2] // keys.heads)
    module = few if rows <= few.MOST_ROWS else xla
    return module.forward(q, keys, masks, causal=causal)


def _xla(q, k, v, masks, *, causal):
    results = _blocked(q, Dense(k, v), masks, causal=causal)
    return results[0], (q, k, v, masks, results)


def _xla_gradients(residuals, dout, *, causal):
    return *xla.backward(*residuals, dout, causal=causal), None


def _paged_definition(q, pool, pages, masks):
    """The definition over each row's pages, copied together."""
    rows = pool[pages].reshape(len(pages), -1, pool.shape[2] // 2, 2, pool.shape[3])
    k, v = rows[..., 0, :], rows[..., 1, :]
    return _definition(q, k, v, masks, causal=True)[0]


def _paged_xla(q, pool, pages, masks):
    return _blocked(q, Paged(pool, pages), masks, causal=True)[0]


def _no_gradients(operands, dout):
    raise ValueError("attention: over pages it has no gradient; differentiate without a cache")


# Operands: (q, k, v, masks).
ATTENTION = dispatch.Op(
    "attention",
    {
        "reference": dispatch.Implementation(_definition, _definition_gradients),
        "xla": dispatch.Implementation(_xla, _xla_gradients),
        "pallas_tpu": dispatch.Implementation(
            splash.forward,
            splash.backward,
            splash.unsupported,
            platforms=("tpu",),
            outputs=splash.outputs,
        ),
    },
)

# Operands: (q, pool, pages, masks).
PAGED_ATTENTION = dispatch.Op(
    "attention",
    {
        "reference": dispatch.Implementation(
            dispatch.keeping_operands(_paged_definition), _no_gradients
        ),
        "xla": dispatch.Implementation(dispatch.keeping_operands(_paged_xla), _no_gradients),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(paged_tpu.outputs),
            _no_gradients,
            paged_tpu.unsupported,
            platforms=("tpu",),
        ),
    },
)


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"] | Float[Array, "pages page 2K C"],
    v: Float[Array, "B S K C"] | None = None,
    *,
    pages: Int[Array, "B W"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    q_offset: Int[Array, "B"] | None = None,
    causal: bool = True,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "B T H C"]:
    """softmax(q kᵀ / sqrt(C)) v in q's dtype, over the keys that each query sees. No positions.

    Query head h uses kv head h // (H // K). Key s stands at position s; query t at position t, or
    at q_offset[b] + t if k and v are a cache that already holds the new tokens: then positions from
    q_offset[b] + T on are not seen, and may hold anything, NaN too. With `segment_ids` a query
    sees keys of its own id only; keys take `kv_segment_ids`, or the queries' ids where there is no
    cache. Queries from `lengths` on, and queries that see no key, give zeros and no gradient.
    `causal=False` lets every query see every key, without a cache only.
    With `pages` the cache is a pool of pages that rows share, given as `k` alone: `pages[b]` names
    row b's in order, and in a page the heads' keys and values take turns (k of head 0, v of head 0,
    k of head 1, …), in any float dtype. A row's pages are read where they lie, and those past its
    end not at all. It goes with `q_offset` and `lengths`, and has no gradient.
    Statistics and sums are float32; memory grows linearly with T and S.
    `target` is the platform that the program is compiled for, where the caller knows it.
    Raises ValueError for shapes that disagree, for options that contradict each other and for an
    implementation that cannot run.
    """
    integers = lambda values: None if values is None else values.astype(jnp.int32)
    masks = Masks(integers(q_offset), integers(lengths), segment_ids, kv_segment_ids)
    chosen = {"implementation": implementation, "target": target}
    if pages is not None:
        _check_pages(q, k, v, pages, masks, causal)
        return PAGED_ATTENTION(q, k, pages.astype(jnp.int32), masks, **chosen)
    _check(q, k, v, masks, causal)
    if segment_ids is not None and kv_segment_ids is None:
        masks = dataclasses.replace(masks, kv_segment_ids=segment_ids)
    return ATTENTION(q, k, v, masks, causal=causal, **chosen)


def _check(q: Array, k: Array, v: Array | None, masks: Masks, causal: bool) -> None:
    """Shapes agree, heads divide into groups, and segments are given for keys as for queries."""
    if v is None:
        raise ValueError("attention: v is missing; only a pool of pages holds keys and values both")
    sizes: dict[str, int] = {}
    operands = {"q": (q, "B T H C"), "k": (k, "B S K C"), "v": (v, "B S K C")}
    dispatch.expect_shape("attention", sizes, **operands, **_given(masks))
    _check_heads(sizes["H"], sizes["K"])
    cached = masks.offset is not None
    if not cached and causal and sizes["S"] != sizes["T"]:
        raise ValueError(
            f"attention: q has T={sizes['T']} tokens but k has S={sizes['S']}; "
            "pass q_offset if k and v are a cache"
        )
    if cached and not causal:
        raise ValueError("attention: causal=False does not go with q_offset; a cache is causal")
    if masks.kv_segment_ids is not None and masks.segment_ids is None:
        raise ValueError("attention: kv_segment_ids needs segment_ids for the queries")
    if (
        masks.segment_ids is not None
        and masks.kv_segment_ids is None
        and (cached or sizes["S"] != sizes["T"])
    ):
        raise ValueError("attention: segment_ids with a cache needs kv_segment_ids for its keys")


def _check_pages(
    q: Array, pool: Array, v: Array | None, pages: Array, masks: Masks, causal: bool
) -> None:
    """Raise ValueError for operands over pages that do not go together."""
    if v is not None or masks.offset is None or masks.segment_ids is not None or not causal:
        raise ValueError(
            "attention: pages go with q_offset, with one pool for keys and values in place of k "
            "and without v, without segment_ids and causal=False"
        )
    if not jnp.issubdtype(pages.dtype, jnp.integer):
        raise ValueError(f"attention: pages are {pages.dtype}; they number pages of the pool")
    sizes: dict[str, int] = {}
    operands = {"q": (q, "B T H C"), "k": (pool, "pages page 2K C"), "pages": (pages, "B W")}
    dispatch.expect_shape("attention", sizes, **operands, **_given(masks))
    if sizes["2K"] % 2:
        raise ValueError(
            f"attention: the pool has {sizes['2K']} heads; each kv head has two, k and v"
        )
    _check_heads(sizes["H"], sizes["2K"] // 2)


def _given(masks: Masks) -> dict[str, tuple[Array, str]]:
    """The masks that there are, with their axes, under the names that callers give them."""
    optional = {
        "segment_ids": (masks.segment_ids, "B T"),
        "kv_segment_ids": (masks.kv_segment_ids, "B S"),
        "lengths": (masks.lengths, "B"),
        "q_offset": (masks.offset, "B"),
    }
    return {name: pair for name, pair in optional.items() if pair[0] is not None}


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(
            f"attention: H={heads} query heads do not divide over K={kv_heads} kv heads"
        )
