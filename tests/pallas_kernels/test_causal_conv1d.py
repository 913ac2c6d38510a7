"""Laws of the causal convolution: pieces, documents and padding leave every output as it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, conv_tail
from pallas_kernels.causal_conv1d import reference, specs
from pallas_kernels.testing import check

OUTPUTS = ("y", "tail")
ROUNDING = 2e-6  # float32 sums of W terms in another order
CASE = specs.Case("plain", 2, 23, channels=6, tail=True)


def conv_and_reference(case: specs.Case, **options) -> tuple:
    rows = {**case.rows(), "activation": case.activation}
    return (
        functools.partial(causal_conv1d, **rows, **options),
        functools.partial(reference.causal_conv1d, **rows),
    )


@pytest.mark.parametrize("case", specs.EDGE_CASES, ids=str)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_shifted_products_equal_the_definition(case: specs.Case, implementation) -> None:
    pair = conv_and_reference(case, implementation=implementation)
    check(*pair, case.arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


@pytest.mark.parametrize("middle", [1, 2, 11, 22])
def test_two_pieces_with_a_carried_tail_equal_the_whole(middle: int) -> None:
    def pieces(x: jax.Array, tail: jax.Array, **weights: jax.Array) -> tuple:
        first, tail = causal_conv1d(x[:, :middle], tail=tail, **weights)
        second, tail = causal_conv1d(x[:, middle:], tail=tail, **weights)
        return jnp.concatenate([first, second], axis=1), tail

    check(pieces, causal_conv1d, CASE.arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


def test_packed_documents_equal_the_documents_apart() -> None:
    bounds = (0, 2, 3, 14, 21, 23)

    def apart(x: jax.Array, tail: jax.Array, **weights: jax.Array) -> tuple:
        outputs = []
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            y, last = causal_conv1d(x[:, start:stop], tail=tail, **weights)
            outputs.append(y)
            tail = jnp.zeros_like(tail)
        return jnp.concatenate(outputs, axis=1), last

    ids = np.repeat(np.arange(5) % 2, np.diff(bounds)) * np.ones((2, 1))
    packed = functools.partial(causal_conv1d, segment_ids=ids.astype(np.int32))
    check(packed, apart, CASE.arrays(), outputs=OUTPUTS, tolerance=ROUNDING)


def test_padding_changes_no_tail_and_gets_no_gradient() -> None:
    arrays = {name: jnp.asarray(array) for name, array in CASE.arrays().items()}
    lengths = jnp.asarray([2, 17])
    padding = np.arange(23) >= np.asarray(lengths)[:, None]

    def conv(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return causal_conv1d(**{**arrays, "x": x}, lengths=lengths)

    (y, tail), pullback = jax.vjp(conv, arrays["x"])
    other = conv(jnp.where(padding[..., None], 7.0, arrays["x"]))
    np.testing.assert_array_equal(y, other[0])
    np.testing.assert_array_equal(tail, other[1])
    assert not np.asarray(y)[padding].any()
    gradient = np.asarray(pullback((jnp.ones_like(y), jnp.ones_like(tail)))[0])
    assert not gradient[padding].any()
    assert gradient[~padding].all()


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_a_tail_after_some_of_a_few_tokens_is_that_of_the_shorter_row(tokens: int) -> None:
    rng = np.random.default_rng(0)
    rows = tokens + 1  # one for each count, none of them too
    x, tail = rng.standard_normal((rows, tokens, 5)), rng.standard_normal((rows, 3, 5))
    x[np.arange(tokens) >= np.arange(rows)[:, None]] = np.nan  # what does not count may be anything
    found = conv_tail(jnp.asarray(x), jnp.asarray(tail), jnp.arange(rows))
    both = np.concatenate([tail, x], axis=1)
    expected = [both[row, row : row + 3] for row in range(rows)]
    np.testing.assert_array_equal(found, np.float32(expected))


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    arrays = CASE.arrays(dtype=jnp.bfloat16)
    pair = causal_conv1d, reference.causal_conv1d
    # y, dx and the tail are rounded to bfloat16 once, at most 2^-8 apart.
    check(*pair, arrays, outputs=OUTPUTS, tolerance=4e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.zeros((4, 5))}, r"weight has shape \(4, 5\), but channels"),
        ({"tail": jnp.zeros((2, 4, 6))}, r"tail has shape \(2, 4, 6\), but W-1"),
        ({"activation": "gelu"}, "activation='gelu' must be 'silu' or None"),
        ({"implementation": "cudnn"}, "implementation='cudnn' does not exist"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arrays = {name: jnp.asarray(array) for name, array in CASE.arrays().items()}
    with pytest.raises(ValueError, match=f"causal_conv1d: {message}"):
        causal_conv1d(**{**arrays, **change})
