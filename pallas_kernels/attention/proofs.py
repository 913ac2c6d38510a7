"""What is proven of attention: JAX's kernels at Super's shape, as this op calls them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import op, specs, splash
from pallas_kernels.attention.masks import Masks
from pallas_kernels.proofs import Proof, nbytes


def proofs() -> Iterator[Proof]:
    """Whole rows, and rows over pages."""
    yield from _whole_rows()
    yield from _pages()


def _whole_rows() -> Iterator[Proof]:
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


def _pages() -> Iterator[Proof]:
    """A token of 64 rows at 8192, from pages in bfloat16 and FP8; four drafts and a token of them;
    a chunk of 1024 tokens of one row at 32,768. Pages have 64 tokens."""
    case, page = specs.SHAPES["super"], 64
    for direction, rows, tokens, context, dtype in (
        ("decode", 64, 1, 8192, jnp.bfloat16),
        ("decode, FP8 pages", 64, 1, 8192, jnp.float8_e4m3fn),
        ("verify 5", 64, 5, 8192, jnp.bfloat16),
        ("read 1024", 1, 1024, 32_768, jnp.bfloat16),
    ):
        shape, integers = jax.ShapeDtypeStruct, jnp.int32
        width = context // page
        q = shape((rows, tokens, case.heads, case.head_dim), jnp.bfloat16)
        pool = shape((rows * width + 1, page, 2 * case.kv_heads, case.head_dim), dtype)
        table, offset = shape((rows, width), integers), shape((rows,), integers)
        seen = rows * (tokens * (context - tokens) + tokens * (tokens + 1) // 2)
        own = 1 + np.arange(rows * width, dtype=np.int32).reshape(rows, width)
        before = np.full(rows, context - tokens, np.int32)
        yield Proof(
            kernel="ragged_paged_attention_kernel",
            direction=direction,
            shape="super",
            run=functools.partial(_over_pages, "pallas_tpu"),
            operands=(q, pool, table, offset),
            flops=4 * seen * case.heads * case.head_dim,
            bytes=nbytes(q, q, table) + nbytes(pool) * rows * width // (rows * width + 1),
            plain=functools.partial(_over_pages, "xla"),
            given={2: own, 3: before},
        )


def _over_pages(implementation, q, pool, table, offset):
    masks = Masks(offset, None)
    return op.PAGED_ATTENTION(q, pool, table, masks, implementation=implementation)


def _masks(q, ids):
    return Masks(None, jnp.full(q.shape[0], q.shape[1], jnp.int32), ids, ids)


def _forward(implementation, q, k, v, ids):
    return op.ATTENTION(q, k, v, _masks(q, ids), implementation=implementation, causal=True)


def _gradients(q, k, v, ids, dout):
    pullback = splash.forward(q, k, v, _masks(q, ids), causal=True)[1]
    return splash.backward(pullback, dout, causal=True)[:3]
