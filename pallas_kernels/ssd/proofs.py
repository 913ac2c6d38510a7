"""What is proven of the scan: both directions at the published shapes, in bfloat16."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.proofs import Proof, nbytes
from pallas_kernels.ssd import op, pallas_tpu, specs

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
FULL_CHUNK = 128


def proofs() -> Iterator[Proof]:
    """Super's and Nano's scans of one row of 8192 tokens."""
    for name in ("super", "nano"):
        case = specs.SHAPES[name]
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=BF16)
        full = functools.partial(jax.ShapeDtypeStruct, dtype=F32)
        row, heads = (case.batch, case.tokens), (case.heads,)
        # As the layer's products leave them: heads and groups side by side.
        x = shape((*row, case.heads * case.head_dim))
        shared = shape((*row, case.groups * case.state_size))
        state = full((case.batch, case.heads, case.head_dim, case.state_size))
        documents = jax.ShapeDtypeStruct(row, I32)
        operands = (x, full((*row, case.heads)), full(heads), shared, shared, full(heads))
        operands += (state, documents)
        chunks = case.tokens // FULL_CHUNK
        kept = shape((case.batch, chunks, case.heads * case.head_dim, case.state_size))
        pairs = FULL_CHUNK * case.groups * case.state_size, FULL_CHUNK * case.heads * case.head_dim
        states = 2 * case.heads * case.head_dim * case.state_size
        tokens, steps = case.batch * case.tokens, case.batch * case.groups * chunks
        yield Proof(
            kernel="ssd_forward",
            direction="forward",
            shape=name,
            run=functools.partial(_forward, case),
            operands=operands,
            flops=2 * tokens * (pairs[0] + pairs[1] + states),
            bytes=nbytes(operands, x, state, kept),
            steps=steps,
            plain=functools.partial(_plain, case),
        )
        yield Proof(
            kernel="ssd_backward",
            direction="backward",
            shape=name,
            run=functools.partial(_backward, case),
            operands=(*operands, kept, x, state),
            flops=2 * tokens * (3 * pairs[0] + 2 * pairs[1] + 2 * states),
            bytes=nbytes(operands, kept, x, state, operands[:6], state),
            steps=steps,
        )


def _split(case: specs.Case, x, dt, A, B, C, D, *rest):
    by_head = lambda array: array.reshape(*array.shape[:2], case.heads, case.head_dim)
    by_group = lambda array: array.reshape(*array.shape[:2], case.groups, case.state_size)
    return by_head(x), dt, A, by_group(B), by_group(C), D, *rest


def _joined(results):
    return [a.reshape(*a.shape[:2], -1) if a is not None and a.ndim == 4 else a for a in results]


def _forward(case: specs.Case, *operands):
    (y, state), residuals = pallas_tpu.forward(*_split(case, *operands), chunk=FULL_CHUNK)
    return *_joined([y]), state, residuals[-1]


def _backward(case: specs.Case, *operands):
    *operands, kept, dy, dstate = operands
    operands = _split(case, *operands)
    cotangents = dy.reshape(operands[0].shape), dstate
    *gradients, dfirst, _ = pallas_tpu.backward((*operands, kept), cotangents, chunk=FULL_CHUNK)
    return *_joined(gradients), dfirst


def _plain(case: specs.Case, *operands):
    results = op.SCAN(*_split(case, *operands), implementation="xla", chunk=FULL_CHUNK)
    return *_joined(results[:1]), results[1]
