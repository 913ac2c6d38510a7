"""The causal depthwise convolution before Mamba-2's scan: contract, checks, gradients."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.causal_conv1d import pallas_tpu, reference, xla

ACTIVATIONS = ("silu", None)


def _definition(x, weight, bias, tail, documents, *, activation):
    """The definition under the signature of an implementation."""
    return reference.causal_conv1d(
        x, weight, bias, tail=tail, segment_ids=documents, activation=activation
    )[0]


def _xla_gradients(operands, dy, *, activation):
    return *xla.backward(*operands, dy, activation=activation), None


# Operands: (x, weight, bias, tail, documents). Bias, tail and documents may be None; documents are
# counted, from the row's first token.
CONVOLVE = dispatch.Op(
    "causal_conv1d",
    {
        "reference": dispatch.Implementation(*dispatch.autodiff(_definition)),
        "xla": dispatch.Implementation(dispatch.keeping_operands(xla.forward), _xla_gradients),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(xla.forward),
            pallas_tpu.backward,
            pallas_tpu.unsupported,
            platforms=("tpu",),
        ),
    },
)


def causal_conv1d(
    x: Float[Array, "B T channels"],
    weight: Float[Array, "W channels"],
    bias: Float[Array, "channels"] | None = None,
    *,
    tail: Float[Array, "B W-1 channels"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    activation: Literal["silu"] | None = "silu",
    implementation: str | None = None,
    target: str | None = None,
) -> tuple[Float[Array, "B T channels"], Float[Array, "B W-1 channels"]]:
    """Outputs y in x's dtype, and the tail: the last W - 1 inputs, where the next piece goes on.

    y_t = activation(bias + sum_w weight[w] x_{t-W+1+w}) for each channel, summed in float32;
    `weight[W-1]` multiplies the current token. `tail` holds the inputs before the row, in the
    document of its first token; None stands for zeros. A change of segment id starts a document,
    and no tap reaches into an earlier one. Tokens at or past `lengths` give y = 0, enter no tail
    and receive no gradient. The returned tail reaches into the given one where the row is shorter
    than W - 1, and is 0 where it would leave the document of the last token.
    `target` is the platform that the program is compiled for, where the caller knows it.
    Raises ValueError for shapes that disagree, an unknown activation or implementation.
    """
    _check(x, weight, bias, tail, segment_ids, lengths, activation)
    batch, tokens, channels = x.shape
    tail = None if tail is None else tail.astype(x.dtype)
    documents = None if segment_ids is None else _documents(segment_ids)
    operands = (x, weight, bias, tail, documents)
    y = CONVOLVE(*operands, implementation=implementation, target=target, activation=activation)
    if lengths is not None:
        y = jnp.where((jnp.arange(tokens) < lengths[:, None])[..., None], y, 0)
    if tail is None:
        tail = jnp.zeros((batch, weight.shape[0] - 1, channels), x.dtype)
    if lengths is None and documents is None:
        return y, _last(x, tail)
    ends = jnp.full((batch,), tokens) if lengths is None else jnp.minimum(lengths, tokens)
    return y, _tails(x, tail, documents, ends[:, None])[:, 0]


def conv_tail(
    x: Float[Array, "B T channels"], tail: Float[Array, "B W-1 channels"], count: Int[Array, "B"]
) -> Float[Array, "B W-1 channels"]:
    """The last W - 1 inputs after the first `count` of a few tokens, as `causal_conv1d` tells them
    after all; a count of 0 leaves the tail."""
    kept, inputs = tail.shape[1], jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    found = tail
    for end in range(1, x.shape[1] + 1):  # windows one after another: a gather takes far longer
        found = jnp.where((count >= end)[:, None, None], inputs[:, end : end + kept], found)
    return found


def _documents(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many documents have started since the row's first token."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _last(x: Array, tail: Array) -> Array:
    """The last W - 1 of tail and x, without joining them when x alone is long enough."""
    kept = tail.shape[1]
    if x.shape[1] >= kept:
        return x[:, x.shape[1] - kept :]
    return jnp.concatenate([tail, x], axis=1)[:, x.shape[1] :]


def _tails(
    x: Array, tail: Array, documents: Array | None, ends: Int[Array, "B n"]
) -> Float[Array, "B n W-1 channels"]:
    """The W - 1 inputs before each end, 0 where they are of an earlier document than the last."""
    kept = tail.shape[1]
    at = ends[..., None] + jnp.arange(kept)  # in [tail, x], where token t stands at t + W - 1
    inputs = jnp.concatenate([tail, x], axis=1)
    taken = jnp.take_along_axis(inputs[:, None], at[..., None], axis=2)
    if documents is None or not kept:
        return taken
    documents = jnp.pad(documents, ((0, 0), (kept, 0)))
    owner = jnp.take_along_axis(documents[:, None], at, axis=2)
    return jnp.where((owner == owner[..., -1:])[..., None], taken, 0)


def _check(x, weight, bias, tail, segment_ids, lengths, activation) -> None:
    """Shapes agree, the activation is known, and there is at least one token and one tap."""
    op, sizes = "causal_conv1d", {}
    dispatch.expect_shape(op, sizes, x=(x, "B T channels"), weight=(weight, "W channels"))
    sizes["W-1"] = sizes["W"] - 1
    optional = {
        "bias": (bias, "channels"),
        "tail": (tail, "B W-1 channels"),
        "segment_ids": (segment_ids, "B T"),
        "lengths": (lengths, "B"),
    }
    given = {name: pair for name, pair in optional.items() if pair[0] is not None}
    dispatch.expect_shape(op, sizes, **given)
    for letter, what in (("T", "token"), ("W", "tap")):
        if sizes[letter] < 1:
            raise ValueError(f"{op}: {letter}={sizes[letter]}; at least one {what} is needed")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation={activation!r} must be 'silu' or None")
