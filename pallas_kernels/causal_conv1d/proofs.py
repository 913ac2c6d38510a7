"""What is proven of the convolution: its gradient at the published shapes, in bfloat16."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import op, pallas_tpu, specs
from pallas_kernels.proofs import Proof, nbytes

SILU = {"activation": "silu"}


def proofs() -> Iterator[Proof]:
    """The gradients of one row of 8192 tokens with documents, as training asks for them."""
    for name in ("super", "nano"):
        case = specs.SHAPES[name]
        x = jax.ShapeDtypeStruct((case.batch, case.tokens, case.channels), jnp.bfloat16)
        weight = jax.ShapeDtypeStruct((case.width, case.channels), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((case.channels,), jnp.bfloat16)
        documents = jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32)
        parts = case.channels // pallas_tpu.CHANNELS
        steps = case.batch * parts * (case.tokens // pallas_tpu.TOKENS[0])
        trips = pallas_tpu.CHANNELS // pallas_tpu.LANES
        yield Proof(
            kernel="causal_conv1d_backward",
            direction="backward",
            shape=name,
            run=functools.partial(_backward, "pallas_tpu"),
            operands=(x, weight, bias, documents, x),
            flops=10 * case.width * x.size,
            bytes=nbytes(x, x, x, documents),
            steps=steps,
            branches=((1, steps, trips),),
            multiplied_flops=0,  # by the matrix units
            plain=functools.partial(_backward, "xla"),
        )


def _backward(implementation, x, weight, bias, documents, dy):
    entry = op.CONVOLVE.implementations[implementation]
    return entry.backward((x, weight, bias, None, documents), dy, **SILU)[:3]
