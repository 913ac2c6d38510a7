"""What is proven of attention: JAX's splash kernels at Super's shape, as this op calls them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.attention import op, specs, splash
from pallas_kernels.attention.masks import Masks
from pallas_kernels.proofs import Proof, nbytes


def proofs() -> Iterator[Proof]:
    """One row of 8192 tokens with documents, forward and the two kernels of the gradient."""
    case = specs.SHAPES["super"]
    q = jax.ShapeDtypeStruct((case.batch, case.tokens, case.heads, case.head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((case.batch, case.tokens, case.kv_heads, case.head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32)
    pairs = case.batch * case.heads * case.tokens * (case.tokens + 1) // 2  # that causality leaves
    blocks = case.tokens // splash.BLOCKS[0]
    opened = case.batch * case.heads * blocks  # blocks of queries
    steps = opened * blocks
    yield Proof(
        kernel="splash_mha_fwd_segmented_no_residuals",
        direction="forward",
        shape="super",
        run=functools.partial(_forward, "pallas_tpu"),
        operands=(q, k, k, ids),
        flops=4 * pairs * case.head_dim,
        bytes=nbytes(q, q, k, k, ids),
        steps=steps,
        branches=((opened,), ((steps + opened) / 2,), (opened,)),  # start, causal blocks, end
        plain=functools.partial(_forward, "xla"),
    )
    # No cycles are told of these: heads follow one another, on one core of the two.
    for kernel, direction, products, results in (
        ("splash_mha_dq_segmented_no_residuals", "of queries", 3, (q,)),
        ("splash_mha_dkv_segmented_no_residuals", "of keys", 4, (k, k)),
    ):
        yield Proof(
            kernel=kernel,
            direction=direction,
            shape="super",
            run=_gradients,
            operands=(q, k, k, ids, q),
            flops=2 * products * pairs * case.head_dim,
            bytes=nbytes(q, k, k, ids, q, results),
        )


def _masks(q, ids):
    zero = jnp.zeros(q.shape[0], jnp.int32)
    return Masks(zero, zero + q.shape[1], ids, ids)


def _forward(implementation, q, k, v, ids):
    return op.ATTENTION(q, k, v, _masks(q, ids), implementation=implementation, causal=True)


def _gradients(q, k, v, ids, dout):
    pullback = splash.forward(q, k, v, _masks(q, ids), causal=True)[1]
    return splash.backward(pullback, dout, causal=True)[:3]
