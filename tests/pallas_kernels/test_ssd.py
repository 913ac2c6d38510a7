"""Laws of the selective scan: chunks, pieces, documents and padding change nothing but rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ssd_outputs, ssd_replay, ssd_scan, ssd_state, ssd_step
from pallas_kernels.ssd import reference, specs
from pallas_kernels.testing import assert_close, check
from tests.marks import slow_but_for

OUTPUTS = ("y", "state")
ROUNDING = 2e-5  # float32 sums in another order; a few hundred terms a result
CASE = specs.EDGE_CASES[2]  # no multiple of the chunk, an initial state


def scan_and_reference(case: specs.Case, **options) -> tuple:
    options = {"chunk": case.chunk, **options}
    return (
        functools.partial(ssd_scan, **case.rows(), **options),
        functools.partial(reference.ssd_scan, **case.rows()),
    )


def operands(case: specs.Case, seed: int = 0) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in case.arrays(seed).items()}


def cut(arrays: dict[str, jax.Array], start: int, stop: int) -> dict[str, jax.Array]:
    """The same operands for some tokens of each row."""
    by_token = ("x", "dt", "B", "C")
    return {k: v[:, start:stop] if k in by_token else v for k, v in arrays.items()}


XLA_CASES = slow_but_for(specs.EDGE_CASES, "odd sizes", "documents inside chunks", "lengths")


@pytest.mark.parametrize("case", specs.EDGE_CASES, ids=str)
def test_chunked_scan_equals_the_recurrence(case: specs.Case) -> None:
    assert_recurrence(case, "cpu")


@pytest.mark.parametrize("case", XLA_CASES)
def test_the_plain_form_equals_the_recurrence(case: specs.Case) -> None:
    assert_recurrence(case, "xla")


def assert_recurrence(case: specs.Case, implementation: str) -> None:
    pair = scan_and_reference(case)
    scan = functools.partial(pair[0], implementation=implementation)
    check(scan, pair[1], case.arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


def test_the_reference_has_the_gradients_of_its_own_definition() -> None:
    case = specs.EDGE_CASES[-1]
    by_name, direct = scan_and_reference(case, implementation="reference")
    check(by_name, direct, case.arrays(), outputs=OUTPUTS, tolerance=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
def test_the_length_of_a_chunk_changes_rounding_alone(chunk: int) -> None:
    scan, _ = scan_and_reference(specs.EDGE_CASES[5], chunk=chunk)
    other, _ = scan_and_reference(specs.EDGE_CASES[5], chunk=16)
    check(scan, other, specs.EDGE_CASES[5].arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


@pytest.mark.parametrize("middle", [16, 70])
def test_two_pieces_with_a_carried_state_equal_the_whole(middle: int) -> None:
    def pieces(initial_state: jax.Array, **arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, state = ssd_scan(**cut(arrays, 0, middle), initial_state=initial_state, chunk=16)
        second, state = ssd_scan(**cut(arrays, middle, None), initial_state=state, chunk=16)
        return jnp.concatenate([first, second], axis=1), state

    whole = functools.partial(ssd_scan, chunk=16)
    check(pieces, whole, CASE.arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


def test_packed_documents_equal_the_documents_apart() -> None:
    lengths = (16, 1, 54)
    bounds = np.cumsum((0, *lengths))

    def apart(initial_state: jax.Array, **arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs, state = [], initial_state
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            y, last = ssd_scan(**cut(arrays, start, stop), initial_state=state, chunk=16)
            outputs.append(y)
            state = jnp.zeros_like(initial_state)
        return jnp.concatenate(outputs, axis=1), last

    ids = np.broadcast_to(np.repeat(np.arange(3) % 2, lengths), (2, 71)).astype(np.int32)
    packed = functools.partial(ssd_scan, segment_ids=ids, chunk=16)
    check(packed, apart, CASE.arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


def test_padding_changes_no_state_and_gets_no_gradient() -> None:
    arrays, lengths = operands(CASE), jnp.asarray([0, 40])
    tokens = np.arange(CASE.tokens) < np.asarray(lengths)[:, None]

    @jax.jit
    def scan(arrays: dict[str, jax.Array]) -> tuple:
        (y, state), pullback = jax.vjp(
            lambda arrays: ssd_scan(**arrays, lengths=lengths, chunk=16), arrays
        )
        return y, state, pullback((jnp.ones_like(y), jnp.ones_like(state)))[0]

    y, state, gradients = scan(arrays)
    short = {k: v[1:] if v.ndim > 1 else v for k, v in cut(arrays, 0, 40).items()}
    expected_y, expected_state = jax.jit(functools.partial(ssd_scan, chunk=16))(**short)
    assert_close(y[1:, :40], expected_y, ROUNDING, "y")
    assert_close(state[1:], expected_state, ROUNDING, "state")
    np.testing.assert_array_equal(state[0], arrays["initial_state"][0])
    assert not np.asarray(y)[~tokens].any()
    for name in ("x", "dt", "B", "C"):
        gradient = np.asarray(gradients[name])
        assert not gradient[~tokens].any(), name
        assert gradient[tokens].any(), name


def test_documents_in_the_padding_start_nothing() -> None:
    arrays = operands(CASE)
    ids = jnp.asarray(np.arange(CASE.tokens) // 25, jnp.int32) * jnp.ones((2, 1), jnp.int32)
    lengths = jnp.asarray([20, 50])
    scan = jax.jit(functools.partial(ssd_scan, **arrays, lengths=lengths, chunk=16))
    padded = ids.at[0, 20:].set(0).at[1, 50:].set(9)
    assert_close(scan(segment_ids=padded)[1], scan(segment_ids=ids)[1], 0.0, "state")


@pytest.mark.parametrize("rate", [-20.0, -200.0, -2000.0])
def test_large_decays_stay_finite_and_right(rate: float) -> None:
    arrays = CASE.arrays()
    arrays["dt"][:, 10:30] = 0.5  # a stretch that forgets all, between stretches that keep
    arrays["A"][0] = rate
    check(*scan_and_reference(CASE, chunk=64), arrays, outputs=OUTPUTS, tolerance=1e-4)


def test_bfloat16_operands_leave_decays_and_states_in_float32() -> None:
    case = specs.Case("bf16", 2, 100, **specs.SMALL, initial_state=True, largest_step=0.1)
    arrays = case.arrays(dtype=jnp.bfloat16)
    scan = functools.partial(ssd_scan, chunk=32)
    # bfloat16 rounds by 2^-8; with formulas that cancel, dA and ddt would be off by 0.2 and more.
    check(scan, reference.ssd_scan, arrays, outputs=OUTPUTS, tolerance=8e-3)


def test_summaries_of_shards_compose_to_the_state_of_the_whole() -> None:
    case = specs.Case("shards", 3, 60, **specs.SMALL, initial_state=True)
    ids = np.zeros((3, 60), np.int32)
    ids[0, 33:], ids[1, 7:] = 1, 1
    lengths = np.asarray([60, 25, 60], np.int32)

    def shards(C: jax.Array, D: jax.Array, initial_state: jax.Array, **arrays) -> jax.Array:
        state, decays = initial_state, []
        for start in (0, 20, 40):
            options = {
                "segment_ids": ids[:, start : start + 20],
                "lengths": np.clip(lengths - start, 0, 20),
            }
            decay, added = ssd_state(**cut(arrays, start, start + 20), **options)
            state = decay[..., None, None] * state + added
            decays.append(decay)
        assert decays[0].shape == (3, 4)
        return state

    def whole(**arrays: jax.Array) -> jax.Array:
        return reference.ssd_scan(**arrays, segment_ids=ids, lengths=lengths)[1]

    check(shards, whole, case.arrays(), outputs=("state",), tolerance=ROUNDING)


@pytest.mark.parametrize("lengths", [None, (0, 2, 5)])
def test_steps_equal_the_recurrence_and_return_every_state(lengths: tuple[int, ...] | None) -> None:
    case = specs.Case("steps", 3, 5, **specs.SMALL, lengths=lengths, initial_state=True)

    def steps(initial_state: jax.Array, implementation: str | None = None, **arrays) -> tuple:
        return ssd_step(**arrays, state=initial_state, implementation=implementation, **case.rows())

    defined = functools.partial(steps, implementation="reference")
    check(steps, defined, case.arrays(), outputs=("y", "states"), tolerance=ROUNDING)
    arrays = operands(case)
    y, states = steps(**arrays)
    expected = reference.ssd_scan(**arrays, **case.rows())
    assert_close(y, expected[0], ROUNDING, "y")
    assert_close(states[:, -1], expected[1], ROUNDING, "last state")
    state = arrays.pop("initial_state")
    last = ssd_step(**arrays, state=state, every_state=False, **case.rows())[1]
    np.testing.assert_array_equal(last, states[:, -1])


def test_verified_tokens_equal_the_recurrence_for_any_count_of_them() -> None:
    """Outputs of all tokens at once, and the state after as many as stand, whatever the rest is."""
    case = specs.Case("verified", 6, 5, **specs.SMALL, initial_state=True)
    arrays = operands(case)
    state = arrays.pop("initial_state")
    expected, states = reference.ssd_step(**arrays, state=state)
    y = jax.jit(ssd_outputs)(**arrays, state=state)
    assert_close(y, expected, ROUNDING, "y")
    counts = jnp.arange(6)
    dead = jnp.arange(5) >= counts[:, None]
    dead = {n: dead.reshape(6, 5, *(1,) * (arrays[n].ndim - 2)) for n in ("x", "dt", "B")}
    some = {n: jnp.where(dead[n], jnp.nan, arrays[n]) for n in ("x", "dt", "B")}
    found = jax.jit(ssd_replay)(**some, A=arrays["A"], state=state, lengths=counts)
    np.testing.assert_array_equal(found[0], state[0])  # none of them stands
    after = states[jnp.arange(1, 6), counts[1:] - 1]
    assert_close(found[1:], after, ROUNDING, "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (2, 71, 3)}, r"dt has shape \(2, 71, 3\), but M of \[B, T, M\] is 4"),
        ({"B": (2, 71, 3, 16), "C": (2, 71, 3, 16)}, "M=4 heads do not divide into G=3 groups"),
        ({"initial_state": (2, 4, 16, 8)}, "initial_state has shape"),
        ({"lengths": (3,)}, r"lengths has shape \(3,\), but B"),
    ],
)
def test_shapes_that_disagree_are_named(change: dict, message: str) -> None:
    arrays = operands(CASE) | {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"ssd_scan: {message}"):
        ssd_scan(**arrays)


def test_unknown_implementations_and_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="ssd_scan: implementation='cuda' does not exist"):
        ssd_scan(**operands(CASE), implementation="cuda")
    with pytest.raises(ValueError, match="ssd_scan: chunk=0 must be at least 1"):
        ssd_scan(**operands(CASE), chunk=0)


def test_memory_grows_with_the_row_and_not_with_its_square() -> None:
    def temporary_bytes(tokens: int) -> int:
        case = specs.Case("long", 1, tokens, **specs.SMALL)
        shapes = jax.eval_shape(lambda: operands(case))
        gradient = jax.jit(jax.grad(lambda arrays: jnp.sum(ssd_scan(**arrays)[0])))
        return gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)
