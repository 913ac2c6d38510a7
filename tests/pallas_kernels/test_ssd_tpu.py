"""The TPU's scan, interpreted, equals the recurrence: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, ssd_scan
from pallas_kernels.ssd import op, pallas_tpu, reference, specs
from pallas_kernels.testing import assert_close, check

OUTPUTS = ("y", "state")
ROUNDING = 2e-5  # float32 sums in another order; a few hundred terms a result
# bfloat16 operands round by 2^-8; measured 1.6e-3 to 3.1e-3. With formulas that cancel, dA and ddt
# would be off by 0.2 and more.
BFLOAT16 = 5e-3
HARD = specs.EDGE_CASES[-1]  # documents, lengths, an initial state, a last chunk that is not full
# The published head and state sizes; two groups of two tiles of heads, three chunks, the last of
# them not full, a document that starts in a chunk and one at its edge.
REAL = specs.Case(
    *("published sizes", 1, 300),
    **{"heads": 8, "head_dim": 64, "groups": 2, "state_size": 128},
    starts=((130, 256),),
    initial_state=True,
)


@pytest.fixture
def interpreted(monkeypatch):
    """`interpreted(mode)` is the scan by the TPU's kernels, run by Pallas' interpreter."""

    def scan(mode=True, **options):
        forward, backward, outputs = (
            functools.partial(function, interpret=mode)
            for function in (pallas_tpu.forward, pallas_tpu.backward, pallas_tpu.outputs)
        )
        entry = dispatch.Implementation(forward, backward, outputs=outputs)
        monkeypatch.setitem(op.SCAN.implementations, "interpreted", entry)
        return functools.partial(ssd_scan, implementation="interpreted", **options)

    return scan


def check_case(scan, case: specs.Case, dtype, tolerance: float) -> None:
    recurrence = functools.partial(reference.ssd_scan, **case.rows())
    kernel = scan(chunk=case.chunk, **case.rows())
    check(kernel, recurrence, case.arrays(dtype=dtype), outputs=OUTPUTS, tolerance=tolerance)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=() if case is HARD else pytest.mark.slow)
        for case in specs.EDGE_CASES
    ],
)
def test_the_kernels_equal_the_recurrence(interpreted, case):
    check_case(interpreted, case, np.float32, ROUNDING)


def test_the_kernels_equal_the_recurrence_at_the_published_sizes_in_bfloat16(interpreted):
    check_case(interpreted, REAL, jnp.bfloat16, BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "tolerance"),
    [(0.01, BFLOAT16), (4.0, 2e-2)],  # nearly all is forgotten at once: dA, a small rest, 1e-2
)
def test_long_and_short_memories_keep_their_digits_in_bfloat16(interpreted, step, tolerance):
    case = specs.Case("memory", 1, 200, 4, 64, 2, 128, initial_state=True, largest_step=step)
    check_case(interpreted, case, jnp.bfloat16, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [-20.0, -2000.0])
def test_large_decays_stay_finite_and_right(interpreted, rate):
    case = specs.EDGE_CASES[2]
    arrays = case.arrays()
    arrays["dt"][:, 10:30] = 0.5  # a stretch that forgets all, between stretches that keep
    arrays["dt"][:, 40] = 0.0
    arrays["A"][0] = rate
    check(interpreted(chunk=64), reference.ssd_scan, arrays, outputs=OUTPUTS, tolerance=1e-4)


@pytest.mark.slow
def test_no_two_steps_of_the_grid_race(interpreted):
    mode = pltpu.InterpretParams(detect_races=True)
    case = specs.Case("races", 1, 40, 4, 8, 2, 16, chunk=16, initial_state=True)
    check_case(functools.partial(interpreted, mode), case, np.float32, ROUNDING)
    # The interpreter prints what it finds, and keeps the record here alone.
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert interpreter.races is not None and not interpreter.races.races_found


def test_a_kernel_that_lets_a_document_see_the_one_before_is_caught(interpreted, monkeypatch):
    read = pallas_tpu.read_tokens

    def blind(*refs):
        tokens = read(*refs)
        return tokens._replace(document_down=tokens.document_down * 0, document=tokens.document * 0)

    monkeypatch.setattr(pallas_tpu, "read_tokens", blind)
    case = specs.Case("blind", 1, 20, 2, 8, 1, 16, chunk=16, starts=((3,),))
    arrays = {name: jnp.asarray(array) for name, array in case.arrays().items()}
    y, _ = interpreted(chunk=case.chunk, **case.rows())(**arrays)
    expected, _ = reference.ssd_scan(**arrays, **case.rows())
    with pytest.raises(AssertionError, match="y: relative L2 error"):
        assert_close(y, expected, ROUNDING, "y")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chunk": 64}, "chunk=64"),
        ({"head_dim": 48}, "head_dim=48"),
        ({"state_size": 64}, "head_dim=64 and state_size=64"),
        ({"heads": 16}, "2 heads a group"),
        ({"dtype": jnp.float16}, "x is float16"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, reason):
    sizes = {"heads": 128, "head_dim": 64, "groups": 8, "state_size": 128} | change
    dtype, chunk = sizes.pop("dtype", jnp.bfloat16), sizes.pop("chunk", 128)
    case = specs.Case("shape", 1, 128, **sizes)
    arrays = jax.eval_shape(lambda: {k: jnp.asarray(v) for k, v in case.arrays().items()})
    for name in ("x", "B", "C"):
        arrays[name] = jax.ShapeDtypeStruct(arrays[name].shape, dtype)
    scan = functools.partial(ssd_scan, chunk=chunk, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=f"ssd_scan: .*cannot run here: {reason}"):
        jax.eval_shape(scan, **arrays)


@pytest.mark.parametrize("name", ["super", "nano"])
def test_a_program_for_a_tpu_holds_the_kernels_at_the_published_shapes(name):
    case = specs.SHAPES[name]
    case = specs.Case(name, 1, 256, case.heads, case.head_dim, case.groups, case.state_size)
    arrays = jax.eval_shape(
        lambda: {k: jnp.asarray(v) for k, v in case.arrays(dtype=jnp.bfloat16).items()}
    )

    def loss(arrays):
        return jnp.sum(ssd_scan(**arrays, target="tpu")[0].astype(jnp.float32))

    program = str(jax.make_jaxpr(jax.grad(loss))(arrays))
    assert "ssd_forward" in program and "ssd_backward" in program
    assert "ssd_forward" not in str(jax.make_jaxpr(lambda a: ssd_scan(**a, target="cpu"))(arrays))
