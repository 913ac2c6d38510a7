"""Causal attention with grouped heads, segments and caches: contract, checks, gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import few, reference, splash, xla
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


def _xla(q, k, v, masks, *, causal):
    """Decoding has a loop of its own; its logsumexp is laid out like that of whole blocks."""
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    module = few if rows <= few.MOST_ROWS else xla
    results = module.forward(q, k, v, masks, causal=causal)
    return results[0], (q, k, v, masks, results)


def _xla_gradients(residuals, dout, *, causal):
    return *xla.backward(*residuals, dout, causal=causal), None


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


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    *,
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
    Statistics and sums are float32; memory grows linearly with T and S.
    `target` is the platform that the program is compiled for, where the caller knows it.
    Raises ValueError for shapes that disagree, for options that contradict each other and for an
    implementation that cannot run.
    """
    _check(
        q,
        k,
        v,
        causal=causal,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        lengths=lengths,
        q_offset=q_offset,
    )
    batch, tokens = q.shape[:2]
    if segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = segment_ids
    masks = Masks(
        offset=_int32(q_offset, batch, 0),
        lengths=_int32(lengths, batch, tokens),
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
    )
    return ATTENTION(q, k, v, masks, implementation=implementation, target=target, causal=causal)


def _int32(values: Array | None, batch: int, default: int) -> Int[Array, "B"]:
    return jnp.full(batch, default, jnp.int32) if values is None else values.astype(jnp.int32)


def _check(q, k, v, *, causal, segment_ids, kv_segment_ids, lengths, q_offset) -> None:
    """Shapes agree, heads divide into groups, and segments are given for keys as for queries."""
    sizes: dict[str, int] = {}
    optional = {
        "segment_ids": (segment_ids, "B T"),
        "kv_segment_ids": (kv_segment_ids, "B S"),
        "lengths": (lengths, "B"),
        "q_offset": (q_offset, "B"),
    }
    given = {name: pair for name, pair in optional.items() if pair[0] is not None}
    operands = {"q": (q, "B T H C"), "k": (k, "B S K C"), "v": (v, "B S K C")}
    dispatch.expect_shape("attention", sizes, **operands, **given)
    if sizes["H"] % sizes["K"]:
        raise ValueError(
            f"attention: H={sizes['H']} query heads do not divide over K={sizes['K']} kv heads"
        )
    if q_offset is None and causal and sizes["S"] != sizes["T"]:
        raise ValueError(
            f"attention: q has T={sizes['T']} tokens but k has S={sizes['S']}; "
            "pass q_offset if k and v are a cache"
        )
    if q_offset is not None and not causal:
        raise ValueError("attention: causal=False does not go with q_offset; a cache is causal")
    if kv_segment_ids is not None and segment_ids is None:
        raise ValueError("attention: kv_segment_ids needs segment_ids for the queries")
    if (
        segment_ids is not None
        and kv_segment_ids is None
        and (q_offset is not None or sizes["S"] != sizes["T"])
    ):
        raise ValueError("attention: segment_ids with a cache needs kv_segment_ids for its keys")
