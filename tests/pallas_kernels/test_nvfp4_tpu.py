"""The TPU's quantiser, interpreted, gives the XLA form's values bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, nvfp4
from pallas_kernels.nvfp4 import op, pallas_tpu

# More than one block of rows, the last of them not full, and of tiles.
ROWS, COLUMNS = 208, 256
STRIPS = np.repeat(np.float32([30, 4, 50, 7, 900, 0.1, 13]), 2)[: ROWS // 16, None]


@pytest.fixture
def interpreted(monkeypatch):
    entry = dispatch.Implementation(
        dispatch.keeping_operands(functools.partial(pallas_tpu.round_trip, interpret=True))
    )
    monkeypatch.setitem(op.ROUND_TRIP.implementations, "interpreted", entry)
    monkeypatch.setattr(pallas_tpu, "ROWS", 128)
    return functools.partial(nvfp4.round_trip, implementation="interpreted")


def operand(dtype):
    rng = np.random.default_rng(0)
    spread = 2.0 ** rng.integers(-3, 4, (ROWS, 1))
    return jnp.asarray(rng.standard_normal((ROWS, COLUMNS)) * spread, dtype)


CASES = [((1, 16), False), ((16, 1), False), ((16, 1), True), ((16, 16), False)]


@pytest.mark.parametrize(("block", "hadamard"), CASES)
def test_values_are_the_xla_forms(interpreted, block, hadamard):
    x, words = operand(jnp.bfloat16), jnp.array([5, 0xFFFFFFF1], jnp.uint32)
    options = {"block": block, "hadamard": hadamard}
    draw = {"rounding": "stochastic", "words": words, "rows": 7 * jnp.arange(ROWS) + 3}

    def all_of(round_trip):
        one = functools.partial(round_trip, x, **options)
        return one(), one(amax=STRIPS), one(**draw), one(**draw, amax=STRIPS)

    expected = jax.jit(lambda: all_of(functools.partial(nvfp4.round_trip, implementation="xla")))()
    for value, wanted in zip(jax.jit(lambda: all_of(interpreted))(), expected, strict=True):
        assert value.dtype == wanted.dtype == jnp.float32
        np.testing.assert_array_equal(value, wanted)
        assert np.any(value)


@pytest.mark.parametrize("block", [(1, 16), (16, 1), (16, 16)])
def test_zeros_extremes_and_nan_are_the_xla_forms(interpreted, block):
    x = np.array(operand(jnp.float32))
    x[:32, :32] = 0
    x[40, 40], x[100, 7] = 1e-30, -6e4
    spoiled = x.copy()
    spoiled[20, 20] = np.nan
    for array in (np.zeros_like(x), x, spoiled):
        value, wanted = (
            jax.jit(functools.partial(form, block=block))(array)
            for form in (interpreted, functools.partial(nvfp4.round_trip, implementation="xla"))
        )
        np.testing.assert_array_equal(value, wanted)
    assert np.isnan(value[20, 20])


def test_scales_that_are_not_rounded_are_caught(interpreted, monkeypatch):
    x = operand(jnp.bfloat16)
    wanted = nvfp4.round_trip(x, block=(16, 1), implementation="xla")
    monkeypatch.setattr(pallas_tpu.xla, "nearest_e4m3", lambda x: x)  # both forms' own
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(interpreted(x, block=(16, 1)), wanted)


def test_what_the_kernel_cannot_do_is_said():
    x = jnp.zeros((32, 96))
    with pytest.raises(ValueError, match="round_trip: .*x is 32 x 96; the kernel takes multiples"):
        nvfp4.round_trip(x, block=(1, 16), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="the Hadamard transform mixes the rows of blocks"):
        nvfp4.round_trip(x, block=(1, 16), hadamard=True)
    with pytest.raises(ValueError, match="round_trip: amax has shape"):
        nvfp4.round_trip(x, block=(1, 16), amax=jnp.ones((32, 1)))


def test_a_program_for_a_tpu_holds_the_kernel():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)
    for target, holds in (("tpu", True), ("cpu", False)):
        trip = functools.partial(nvfp4.round_trip, block=(1, 16), target=target)
        assert ("nvfp4_round_trip" in str(jax.make_jaxpr(trip)(x))) is holds
