"""The selective scan in chunks: matrix products inside a chunk, a carried state between chunks.

One loop goes over the chunks of a row, so that what it works on stays in a cache and memory does not
grow with T times Q. Letters beyond those of the op: c chunks of Q tokens, R heads of a group, and
W = R P, the channels of a group. Layouts are chosen so that nearly every product is a plain
[m, k] x [k, n] under leading axes [B, G] or [B, G, R]: the state is kept as [N, W], because a CPU
pays more for a transposed operand than for the product. The R heads of a group share the products
with B and C. Operands of products have x's dtype and are accumulated in float32; decays and states
are float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

product = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def forward(x, dt, A, B, C, D, state, documents, *, chunk):
    """y and the final state; `documents` counts document starts along the row, from the first token."""
    layout = Layout.of(x, B, chunk)
    inputs, chunks = layout.inputs(x, dt, D), layout.chunks(dt, A, B, C, documents)

    def step(carry, chunk):
        state, y = carry
        tokens = layout.take(inputs, chunk.index)
        y_chunk = chunk_outputs(tokens, chunk, state.astype(x.dtype))
        return (next_state(tokens, chunk, state), layout.put(y, y_chunk, chunk.index)), None

    carry = layout.state_in(state), layout.empty(x.dtype)
    (state, y), _ = jax.lax.scan(step, carry, chunks)
    return layout.tokens_out(y).reshape(x.shape), layout.state_out(state)


def backward(x, dt, A, B, C, D, state, documents, dy, dstate, *, chunk):
    """Cotangents of x, dt, A, B, C, D and the initial state. Nothing is kept from the forward pass."""
    layout = Layout.of(x, B, chunk)
    inputs, chunks = layout.inputs(x, dt, D), layout.chunks(dt, A, B, C, documents)
    dy = layout.tokens_in(dy)

    def advance(state, chunk):
        return next_state(layout.take(inputs, chunk.index), chunk, state), state

    _, states = jax.lax.scan(advance, layout.state_in(state), chunks)

    def step(carry, scanned):
        (chunk, state), (dstate, dx) = scanned, carry
        tokens, dy_chunk = layout.take((inputs, dy), chunk.index)
        dstate, dx_chunk, sums = chunk_gradients(tokens, chunk, dy_chunk, state, dstate)
        return (dstate, layout.put(dx, dx_chunk, chunk.index)), sums

    carry = layout.state_in(dstate), layout.empty(x.dtype)
    (dstate, dx), sums = jax.lax.scan(step, carry, (chunks, states), reverse=True)
    dlog = log_gradient(sums)
    rate = A.astype(jnp.float32).reshape(layout.groups, -1, 1)
    ddt = layout.heads_out(sums.input + dlog * rate)
    dA = jnp.sum(dlog * layout.heads_in(dt), axis=(0, 1, 4))
    return (
        layout.tokens_out(dx).reshape(x.shape),
        ddt.reshape(dt.shape).astype(dt.dtype),
        dA.reshape(A.shape).astype(A.dtype),
        layout.groups_out(sums.B).astype(B.dtype),
        layout.groups_out(sums.C).astype(C.dtype),
        jnp.sum(sums.skip, axis=(0, 1, 4)).reshape(D.shape).astype(D.dtype),
        layout.state_out(dstate),
    )


class Tokens(NamedTuple):
    """What is read per token where it lies in the row: [B, T, ...] or, of one chunk, [B, Q, ...]."""

    x: Float[Array, "B T G R P"]
    dt: Float[Array, "B T G R"]
    D: Float[Array, "G R"] | None = None


class Chunk(NamedTuple):
    """What is prepared for all chunks at once; `scan` takes one from the leading axis c."""

    index: Int[Array, "c"]
    B: Float[Array, "c B G Q N"]
    C: Float[Array, "c B G Q N"]
    log: Float[Array, "c B G R Q"]  # sum of dt A from the chunk's start to the token
    entering: Float[Array, "c B G R Q"]  # decay from the chunk's incoming state to the token
    leaving: Float[Array, "c B G R Q"]  # decay from the token to the chunk's outgoing state
    whole: Float[Array, "c B G R"]  # decay from the incoming to the outgoing state
    documents: Int[Array, "c B Q"] | None  # document starts since the token before the chunk


class Sums(NamedTuple):
    """What a chunk's gradient leaves for the end, per token unless said otherwise."""

    B: Float[Array, "c B G Q N"]
    C: Float[Array, "c B G Q N"]
    input: Float[Array, "c B G R Q"]  # x du, the part of ddt that passes by no decay
    skip: Float[Array, "c B G R Q"]  # x dy
    pairs: Float[Array, "c B G R Q"]  # decays that end at the token, less those that begin there
    leaving: Float[Array, "c B G R Q"]  # decays from the token to the outgoing state
    whole: Float[Array, "c B G R"]  # the decay across the chunk
