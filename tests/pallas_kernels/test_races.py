"""No TPU kernel reads or writes what another copy or core may be writing, by the TPU interpreter.

The scan's is in its own file; JAX's own attention is JAX's to try.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_conv1d import pallas_tpu as conv
from pallas_kernels.grouped_matmul import packed, packed_tpu
from pallas_kernels.grouped_matmul import pallas_tpu as grouped
from pallas_kernels.nvfp4 import pallas_tpu as nvfp4
from pallas_kernels.nvfp4 import tpu_codes

WATCHED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def grouped_products():
    lhs, rhs, dout = normal(96, 128), normal(3, 128, 128), normal(96, 128)
    sizes = jnp.asarray((40, 0, 50), jnp.int32)
    down = jnp.swapaxes(rhs, 1, 2)
    experts = packed.quantize_experts(rhs, implementation="xla")
    tables = experts.words, experts.scales, experts.factor, sizes
    return (
        grouped.matmul(lhs, rhs, sizes, transpose_rhs=False, interpret=WATCHED),
        grouped.outer(lhs, dout, sizes, interpret=WATCHED),
        grouped.mlp_gradients(lhs, rhs, down, sizes, dout, interpret=WATCHED),
        packed_tpu.matmul(lhs, *tables, interpret=WATCHED),
    )


def quantised():
    x, amax = normal(256, 256), jnp.float32(5)
    words, rows = jnp.array([5, 7], jnp.uint32), jnp.arange(256)
    trip = functools.partial(nvfp4.round_trip, interpret=WATCHED)
    packed, _ = tpu_codes.quantize(x, words, rows, amax, block=(1, 16), interpret=WATCHED)
    return (
        trip(x, words, rows, amax, block=(1, 16), hadamard=False),
        trip(x, None, None, amax, block=(16, 1), hadamard=True),
        tpu_codes.pack(tpu_codes.unpack(packed, interpret=WATCHED), interpret=WATCHED),
    )


def convolution():
    x, weight, bias = normal(2, 256, 256), normal(4, 256), normal(256)
    documents = jnp.broadcast_to((jnp.arange(256) > 100).astype(jnp.int32), (2, 256))
    operands = (x, weight, bias, None, documents)
    return conv.backward(operands, normal(2, 256, 256), activation="silu", interpret=WATCHED)


@pytest.fixture
def found(monkeypatch):
    """Whether a race was found, of each kernel that has run: the interpreter forgets the last."""
    states = []

    def begin(**options):
        states.append(RaceDetectionState(**options))
        return states[-1]

    RaceDetectionState = interpreter.RaceDetectionState
    monkeypatch.setattr(interpreter, "RaceDetectionState", begin)
    return lambda: [state.races_found for state in states]


@pytest.mark.slow
@pytest.mark.parametrize("run", [grouped_products, quantised, convolution])
def test_the_kernels_have_no_races(run, found, monkeypatch):
    monkeypatch.setattr(grouped, "TILE_ROWS", (32,))
    monkeypatch.setattr(nvfp4, "ROWS", 128)
    monkeypatch.setattr(nvfp4, "COLUMNS", 256)
    monkeypatch.setattr(conv, "TOKENS", (128,))
    jax.block_until_ready(jax.jit(run)())
    assert found() and not any(found())


@pytest.mark.slow
def test_two_cores_that_write_one_block_are_caught(found):
    def kernel(out_ref):
        out_ref[...] = jnp.full_like(out_ref, pl.program_id(0))

    call = pl.pallas_call(
        kernel,
        grid=(2,),
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=WATCHED,
    )
    jax.block_until_ready(jax.jit(call)())
    assert any(found())
