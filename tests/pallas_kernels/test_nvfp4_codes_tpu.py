"""The TPU's codes, interpreted, are the XLA form's bit for bit: quantised, packed, taken apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, nvfp4
from pallas_kernels.nvfp4 import op, pallas_tpu, tpu_codes

# More than one block of rows, the last of them not full, and of pairs of tiles.
ROWS, COLUMNS = 208, 512


@pytest.fixture
def interpreted(monkeypatch):
    for table, function in (
        (op.QUANTIZE, tpu_codes.quantize),
        (op.PACK, tpu_codes.pack),
        (op.UNPACK, tpu_codes.unpack),
    ):
        run = dispatch.keeping_operands(functools.partial(function, interpret=True))
        monkeypatch.setitem(table.implementations, "interpreted", dispatch.Implementation(run))
    monkeypatch.setattr(pallas_tpu, "ROWS", 128)
    monkeypatch.setattr(pallas_tpu, "COLUMNS", 256)


def operand():
    rng = np.random.default_rng(0)
    spread = 2.0 ** rng.integers(-3, 4, (ROWS, 1))
    x = rng.standard_normal((ROWS, COLUMNS)) * spread
    x[:16, :16] = 0
    return jnp.asarray(x, jnp.bfloat16)


def equal(q, wanted):
    np.testing.assert_array_equal(q.codes, wanted.codes)
    np.testing.assert_array_equal(
        np.asarray(q.scales).view(np.uint8), np.asarray(wanted.scales).view(np.uint8)
    )


FAST = (((1, 16), "stochastic"), ((16, 16), "nearest"))
SLOW = tuple(
    pytest.param(block, rounding, marks=pytest.mark.slow)
    for block in op.BLOCKS
    for rounding in ("nearest", "stochastic")
    if (block, rounding) not in FAST
)


@pytest.mark.parametrize(("block", "rounding"), FAST + SLOW)
def test_codes_and_scales_are_the_xla_forms(interpreted, block, rounding):
    x, words = operand(), jnp.array([5, 0xFFFFFFF1], jnp.uint32)
    form = functools.partial(nvfp4.quantize, block=block, rounding=rounding, key=words)
    quantised, wanted = (
        jax.jit(functools.partial(form, implementation=name))(x) for name in ("interpreted", "xla")
    )
    equal(quantised, wanted)
    assert len(np.unique(quantised.codes)) > 100


def test_packing_and_taking_apart_are_the_xla_forms(interpreted):
    codes = np.random.default_rng(1).integers(0, 16, (ROWS, COLUMNS), np.uint8)
    packed = nvfp4.pack(codes, implementation="interpreted")
    np.testing.assert_array_equal(packed, codes[:, ::2] + 16 * codes[:, 1::2])
    np.testing.assert_array_equal(nvfp4.unpack(packed, implementation="interpreted"), codes)


def test_nibbles_in_the_other_order_are_caught(interpreted, monkeypatch):
    dot = tpu_codes._dot
    monkeypatch.setattr(tpu_codes, "_dot", lambda a, b: dot(a, jnp.where(b > 0, 17 - b, 0)))
    x = operand()
    with pytest.raises(AssertionError):
        equal(nvfp4.quantize(x, implementation="interpreted"), nvfp4.quantize(x))


def test_what_the_kernels_cannot_do_is_said():
    x = jnp.zeros((32, 128))
    with pytest.raises(ValueError, match="quantize: .*x has 128 columns; the kernel takes"):
        nvfp4.quantize(x, implementation="pallas_tpu")
    codes = jnp.zeros((32, 64), jnp.uint8)
    with pytest.raises(ValueError, match="pack: .*the kernel takes matrices of 256 columns each"):
        nvfp4.pack(codes, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="unpack: .*the kernel takes matrices of 128 columns each"):
        nvfp4.unpack(codes, implementation="pallas_tpu")
