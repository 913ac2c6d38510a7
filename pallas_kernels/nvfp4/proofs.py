"""What is proven of quantisation: every block, rounding and transform that training uses, and codes
of weights as a checkpoint holds them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.nvfp4 import op, pallas_tpu, tpu_codes
from pallas_kernels.proofs import Proof, nbytes

ROWS, COLUMNS = 8192, 4096  # of Super's tokens and width
# Block, whether rounding is stochastic, whether rows are transformed first; by product and operand.
USES = {
    "forward, input": ((1, 16), False, False),
    "weights": ((16, 16), False, False),
    "of rows, gradient": ((1, 16), True, False),
    "of weights, input": ((16, 1), False, True),
    "of weights, gradient": ((16, 1), True, True),
}


def proofs() -> Iterator[Proof]:
    """The kernels in each of their uses, on a matrix as large as Super's activations."""
    yield from _of_codes()
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)
    rows = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    amax = jax.ShapeDtypeStruct((), jnp.float32)
    for use, (block, stochastic, hadamard) in USES.items():
        run = functools.partial(
            _trip, block=block, stochastic=stochastic, hadamard=hadamard, kernel=True
        )
        strips = pallas_tpu.ROWS // pallas_tpu.TILE
        steps = ROWS // pallas_tpu.ROWS * COLUMNS // pallas_tpu.COLUMNS
        tiles = pallas_tpu.COLUMNS // pallas_tpu.TILE
        yield Proof(
            kernel="nvfp4_round_trip",
            direction=use,
            shape="super",
            run=run,
            operands=(x, words, rows, amax),
            flops=0,
            bytes=nbytes(x, x),
            steps=steps,
            branches=((steps, tiles),) * strips,
            plain=functools.partial(run, kernel=False),
        )


def _of_codes() -> Iterator[Proof]:
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16)
    amax = jax.ShapeDtypeStruct((), jnp.float32)
    codes = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.uint8)
    packed = jax.ShapeDtypeStruct((ROWS, COLUMNS // 2), jnp.uint8)
    steps = ROWS // pallas_tpu.ROWS * COLUMNS // pallas_tpu.COLUMNS
    strips, pairs = pallas_tpu.ROWS // pallas_tpu.TILE, pallas_tpu.COLUMNS // pallas_tpu.TILE // 2
    scales = jax.ShapeDtypeStruct((ROWS, COLUMNS // 16), jnp.float8_e4m3fn)
    quantize = functools.partial(tpu_codes.quantize, words=None, rows=None, block=(1, 16))
    shared = {"shape": "super", "flops": 0, "steps": steps}
    yield Proof(
        kernel="nvfp4_quantize",
        direction="codes, (1, 16)",
        run=lambda x, amax: quantize(x, amax=amax),
        operands=(x, amax),
        bytes=nbytes(x, packed, scales),
        branches=((steps, pairs),) * strips,
        **shared,
    )
    for kernel, run, operand in (
        ("nvfp4_pack", tpu_codes.pack, codes),
        ("nvfp4_unpack", tpu_codes.unpack, packed),
    ):
        yield Proof(
            kernel=kernel,
            direction="of codes",
            run=run,
            operands=(operand,),
            bytes=nbytes(codes, packed),
            **shared,
        )


def _trip(x, words, rows, amax, *, block, stochastic, hadamard, kernel):
    drawn = (words, rows) if stochastic else (None, None)
    values = op.ROUND_TRIP(
        *(x, *drawn, amax),
        implementation="pallas_tpu" if kernel else "xla",
        block=block,
        hadamard=hadamard,
    )
    return values.astype(jnp.bfloat16)
