"""The causal convolution as W shifted multiply-adds, which XLA fuses with bias and activation.

Without a given tail a shift is a pad, which costs no memory: the forward pass is one loop over its
input. Functions below take one row [T, channels] or a batch of them.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward(
    x: Float[Array, "B T channels"],
    weight: Float[Array, "W channels"],
    bias: Float[Array, "channels"] | None,
    tail: Float[Array, "B W-1 channels"] | None,
    documents: Int[Array, "B T"] | None,
    *,
    activation: str | None,
) -> Float[Array, "B T channels"]:
    """y in x's dtype; `documents` counts document starts along the row, `tail` lies in its 0th."""
    pre = preactivation(shifts(x, tail, documents, weight.shape[0]), weight, bias)
    return (jax.nn.silu(pre) if activation == "silu" else pre).astype(x.dtype)


def backward(
    x: Float[Array, "B T channels"],
    weight: Float[Array, "W channels"],
    bias: Float[Array, "channels"] | None,
    tail: Float[Array, "B W-1 channels"] | None,
    documents: Int[Array, "B T"] | None,
    dy: Float[Array, "B T channels"],
    *,
    activation: str | None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Cotangents of x, weight, bias and tail; the pre-activation is computed again, not kept.

    Rows follow one another: the shifted copies that the sums over tokens need are those of one row.
    """

    def row(sums: Any, operands: Any) -> Any:
        x, tail, documents, dy = operands
        # Made once with what was before the row: shifts are then slices, where each pad was made.
        before = jnp.zeros((weight.shape[0] - 1, x.shape[1]), x.dtype) if tail is None else tail
        joined = jax.lax.optimization_barrier(jnp.concatenate([before, x]))
        inputs = list(windows(joined, documents, weight.shape[0]))
        dpre = dy.astype(jnp.float32)
        if activation == "silu":
            pre = preactivation(inputs, weight, bias)
            gate = jax.nn.sigmoid(pre)
            dpre = dpre * gate * (1.0 + pre * (1.0 - gate))
        dweight = jnp.stack([jnp.sum(dpre * shifted, axis=0) for shifted in inputs])
        dinputs = input_gradients(dpre, weight, tail, documents)
        return (sums[0] + dweight, sums[1] + jnp.sum(dpre, axis=0)), dinputs

    zeros = (jnp.zeros(weight.shape, jnp.float32), jnp.zeros(weight.shape[1:], jnp.float32))
    (dweight, dbias), (dx, dtail) = jax.lax.scan(row, zeros, (x, tail, documents, dy))
    dbias = None if bias is None else dbias.astype(bias.dtype)
    dtail = None if tail is None else dtail.astype(tail.dtype)
    return dx.astype(x.dtype), dweight.astype(weight.dtype), dbias, dtail


def shifts(
    x: Float[Array, "*B T channels"],
    tail: Float[Array, "*B W-1 channels"] | None,
    documents: Int[Array, "*B T"] | None,
    width: int,
) -> Iterator[Float[Array, "*B T channels"]]:
    """The float32 input under each tap, at every token; 0 where it is another document's."""
    if tail is not None:
        yield from windows(jnp.concatenate([tail, x], axis=-2), documents, width)
        return
    for back in reversed(range(width)):
        yield _of_document(shift(x, back, axis=-2), documents, back)


def windows(
    joined: Float[Array, "*B W-1+T channels"], documents: Int[Array, "*B T"] | None, width: int
) -> Iterator[Float[Array, "*B T channels"]]:
    """What `shifts` yields, of a row behind the W - 1 inputs before it."""
    tokens = joined.shape[-2] - (width - 1)
    for start in range(width):
        window = joined[..., start : start + tokens, :]
        yield _of_document(window, documents, width - 1 - start)


def _of_document(
    shifted: Float[Array, "*B T channels"], documents: Int[Array, "*B T"] | None, back: int
) -> Float[Array, "*B T channels"]:
    shifted = shifted.astype(jnp.float32)
    if documents is None:
        return shifted
    same = shift(documents, back, axis=-1) == documents
    return jnp.where(same[..., None], shifted, 0.0)


def preactivation(
    inputs: Any, weight: Float[Array, "W channels"], bias: Float[Array, "channels"] | None
) -> Float[Array, "*B T channels"]:
    """bias + sum over taps, in float32."""
    total = 0.0 if bias is None else bias.astype(jnp.float32)
    for tap, shifted in zip(weight.astype(jnp.float32), inputs, strict=True):
        total += shifted * tap
    return total


def input_gradients(
    dpre: Float[Array, "T channels"],
    weight: Float[Array, "W channels"],
    tail: Float[Array, "W-1 channels"] | None,
    documents: Int[Array, "T"] | None,
) -> tuple[Float[Array, "T channels"], Float[Array, "W-1 channels"] | None]:
    """Cotangents of a row's inputs and of its tail: each tap sends back what it took."""
    width, tokens = weight.shape[0], dpre.shape[0]
    dx, dtail = 0.0, None if tail is None else 0.0
    for back, tap in zip(reversed(range(width)), weight.astype(jnp.float32), strict=True):
        sent = dpre * tap
        if documents is not None:
            same = shift(documents, back, axis=-1) == documents
            sent = jnp.where(same[:, None], sent, 0.0)
        dx += shift(sent, -back, axis=-2)
        if (
            tail is not None
        ):  # the first `back` tokens look into the tail, whose last entry is 1 back
            reach = min(back, tokens)
            before = width - 1 - back
            dtail += jnp.pad(sent[:reach], ((before, width - 1 - before - reach), (0, 0)))
    return dx, dtail


def shift(array: Array, by: int, *, axis: int) -> Array:
    """The array moved `by` places towards higher indices, with zeros moving in."""
    widths = [(0, 0, 0)] * array.ndim
    widths[axis] = (by, -by, 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), widths)
