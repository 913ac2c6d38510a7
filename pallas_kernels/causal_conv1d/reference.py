"""The causal depthwise convolution before Mamba-2's scan, one token at a time: the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv1d(
    x: Float[Array, "B T channels"],
    weight: Float[Array, "W channels"],
    bias: Float[Array, "channels"] | None = None,
    *,
    tail: Float[Array, "B W-1 channels"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    activation: str | None = "silu",
) -> tuple[Float[Array, "B T channels"], Float[Array, "B W-1 channels"]]:
    """y_t = act(bias + sum_w weight[w] x_{t-W+1+w}) in float32, and the last W - 1 inputs.

    A change of segment id forgets all earlier inputs; tokens from lengths[b] on change nothing and
    give y = 0.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[0]
    if tail is None:
        tail = jnp.zeros((batch, width - 1, channels), x.dtype)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, tokens), jnp.int32)
    if lengths is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.concatenate([jnp.zeros((batch, 1), bool), starts], axis=1)
    valid = jnp.arange(tokens) < lengths[:, None]

    def step(tail: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_t, starts_t, valid_t = token
        kept = jnp.where(starts_t[:, None, None], 0.0, tail)
        window = jnp.concatenate([kept, x_t[:, None]], axis=1)
        y_t = jnp.einsum("bwc,wc->bc", window, weight.astype(jnp.float32))
        y_t = y_t if bias is None else y_t + bias
        y_t = jax.nn.silu(y_t) if activation == "silu" else y_t
        tail = jnp.where(valid_t[:, None, None], window[:, 1:], tail)
        return tail, jnp.where(valid_t[:, None], y_t, 0.0)

    by_token = [jnp.moveaxis(a, 1, 0) for a in (x.astype(jnp.float32), starts, valid)]
    new_tail, y = jax.lax.scan(step, tail.astype(jnp.float32), by_token)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), new_tail.astype(x.dtype)
