"""The causal convolution as W shifted multiply-adds, which XLA fuses with bias and activation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward(x, weight, bias, tail, documents, *, activation):
    """y in x's dtype; `documents` is None or counts document starts along the row, `tail` is in its 0th."""
    y = preactivation(with_tail(x, tail), weight, bias, documents)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(x.dtype)


def backward(x, weight, bias, tail, documents, dy, *, activation):
    """Cotangents of x, weight, bias and tail; the pre-activation is computed again, not kept."""
    inputs, width, tokens = with_tail(x, tail), weight.shape[0], x.shape[1]
    dpre = dy.astype(jnp.float32)
    if activation == "silu":
        pre = preactivation(inputs, weight, bias, documents)
        gate = jax.nn.sigmoid(pre)
        dpre = dpre * gate * (1.0 + pre * (1.0 - gate))
    dinputs, dweight = 0.0, []
    for tap in range(width):
        d = dpre if documents is None else jnp.where(reaches(documents, width, tap), dpre, 0.0)
        shifted = inputs[:, tap : tap + tokens].astype(jnp.float32)
        dweight.append(jnp.sum(d * shifted, axis=(0, 1)))
        dinputs += jnp.pad(d * weight[tap].astype(jnp.float32), ((0, 0), (tap, width - 1 - tap), (0, 0)))
    dbias = None if bias is None else jnp.sum(dpre, axis=(0, 1)).astype(bias.dtype)
    dweight = jnp.stack(dweight).astype(weight.dtype)
    dtail, dx = dinputs[:, : width - 1], dinputs[:, width - 1 :]
    return dx.astype(x.dtype), dweight, dbias, dtail.astype(tail.dtype)


def with_tail(
    x: Float[Array, "B T channels"], tail: Float[Array, "B W-1 channels"]
) -> Float[Array, "B T+W-1 channels"]:
    return jnp.concatenate([tail, x], axis=1)


def preactivation(
    inputs: Float[Array, "B T+W-1 channels"],
    weight: Float[Array, "W channels"],
    bias: Float[Array, "channels"] | None,
    documents: Int[Array, "B T"] | None,
) -> Float[Array, "B T channels"]:
    """bias + sum over taps, in float32."""
    width = weight.shape[0]
    tokens = inputs.shape[1] - width + 1
    total = 0.0 if bias is None else bias.astype(jnp.float32)
    for tap in range(width):
        term = inputs[:, tap : tap + tokens].astype(jnp.float32) * weight[tap].astype(jnp.float32)
        if documents is not None:
            term = jnp.where(reaches(documents, width, tap), term, 0.0)
        total += term
    return total


def reaches(documents: Int[Array, "B T"], width: int, tap: int) -> Array:
    """Whether the token under `tap`, W - 1 - tap back, lies in the document of the current token."""
    back = width - 1 - tap
    earlier = jnp.pad(documents, ((0, 0), (back, 0)))[:, : documents.shape[1]]
    return (earlier == documents)[..., None]
