"""The TPU's gradient of the convolution, interpreted, equals the definition's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, dispatch
from pallas_kernels.causal_conv1d import op, pallas_tpu, reference, specs, xla
from pallas_kernels.testing import check

OUTPUTS = ("y", "tail")
# Three blocks of 16 tokens; documents start beside their edges, and in the halo of one.
BLOCKS = specs.Case(
    *("blocks", 2, 48),
    channels=8,
    starts=((1, 15, 16, 33), (17, 30)),
    lengths=(48, 37),
    tail=True,
)


@pytest.fixture
def interpreted(monkeypatch):
    gradients = functools.partial(pallas_tpu.backward, interpret=True)
    entry = dispatch.Implementation(dispatch.keeping_operands(xla.forward), gradients)
    monkeypatch.setitem(op.CONVOLVE.implementations, "interpreted", entry)
    monkeypatch.setattr(pallas_tpu, "TOKENS", (16,))
    return functools.partial(causal_conv1d, implementation="interpreted")


def check_case(convolve, case, dtype=np.float32, tolerance=1e-5):
    options = {"activation": case.activation, **case.rows()}
    run, definition = (functools.partial(f, **options) for f in (convolve, reference.causal_conv1d))
    check(run, definition, case.arrays(dtype=dtype), outputs=OUTPUTS, tolerance=tolerance)


FAST = (BLOCKS,)
SLOW = tuple(case for case in specs.EDGE_CASES if 1 < case.width < pallas_tpu.SUMS)


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_gradients_equal_the_definition(interpreted, case):
    check_case(interpreted, case)


@pytest.mark.slow
def test_bfloat16_inputs_are_summed_in_float32(interpreted):
    check_case(interpreted, BLOCKS, jnp.bfloat16, 4e-3)  # one rounding of dx: 2^-9


def test_a_carry_that_is_lost_is_caught(interpreted, monkeypatch):
    monkeypatch.setattr(pallas_tpu.pltpu, "roll", lambda x, by, axis: jnp.roll(x, by + 1, axis))
    with pytest.raises(AssertionError, match="gradient of"):
        check_case(interpreted, specs.Case("short", 1, 16, channels=4, bias=False))


def test_what_the_kernel_cannot_do_is_said():
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 100, 128), (4, 128)))
    call = functools.partial(causal_conv1d, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="causal_conv1d: .*T=100, channels=128, W=4; the kernel"):
        jax.eval_shape(call, x, weight)
