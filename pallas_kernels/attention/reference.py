"""The definition of attention: every score at once, masked, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
) -> Float[Array, "B T H C"]:
    """softmax(q kᵀ / sqrt(C)) v over the keys that a query may see; zeros where it sees none.

    Keys and values that no query sees may be anything, NaN too.
    """
    batch, tokens, heads, channels = q.shape
    keys, kv_heads = k.shape[1:3]
    offset = jnp.zeros(batch, jnp.int32) if q_offset is None else q_offset
    position = offset[:, None] + jnp.arange(tokens)
    visible = jnp.ones((batch, tokens, keys), bool)
    if causal:
        visible &= jnp.arange(keys) <= position[..., None]
    if segment_ids is not None:
        of_key = segment_ids if kv_segment_ids is None else kv_segment_ids
        visible &= segment_ids[..., None] == of_key[:, None]
    if lengths is not None:
        visible &= (jnp.arange(tokens) < lengths[:, None])[..., None]
    seen = jnp.any(visible, axis=1)[..., None, None]
    visible = visible[:, None]
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    k, v = (jnp.where(seen, a, 0) for a in (k, v))
    k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
    scores = jnp.einsum("bthc,bshc->bhts", q, k, precision="highest") / jnp.sqrt(channels)
    scores = jnp.where(visible, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.einsum("bhts,bshc->bthc", weights, v, precision="highest")
