"""Products with packed experts, in XLA and interpreted for TPU, equal the definition's numbers.

One shape is traced and the group sizes are data, so every pattern costs a run and no compilation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import packed, packed_tpu, pallas_tpu, pieces, reference
from pallas_kernels.testing import assert_close

# The depth is not a multiple of the 128 rows that are made together, and no side of a power of two.
ROWS, DEPTH, WIDTH, EXPERTS = 90, 144, 40, 6
PATTERNS = {
    "as in decoding, a row or two each": (2, 1, 0, 3, 1, 0),
    "empty first, middle and last": (0, 30, 0, 50, 3, 0),
    "one of two tiles": (0, 0, 90, 0, 0, 0),
    "rows past the sum": (11, 0, 30, 20, 1, 2),
    "no rows": (0, 0, 0, 0, 0, 0),
    "sizes past the rows": (40, 40, 40, 100, 0, 5),
}
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}  # bfloat16: one rounding of the sum, 2^-9


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILE_ROWS", (64,))
    monkeypatch.setattr(pieces, "LARGE", 32)


def operands(dtype=jnp.float32):
    """lhs, and codes, scales and factors of experts, every code among them."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (EXPERTS, DEPTH, WIDTH)), jnp.uint8)
    scales = np.abs(rng.standard_normal((EXPERTS, DEPTH // 16, WIDTH))) * 2.0 ** rng.integers(-8, 9)
    scales[0, 1] = 0
    factor = jnp.asarray(rng.uniform(0.5, 2, EXPERTS), jnp.float32)
    lhs = jnp.asarray(rng.standard_normal((ROWS, DEPTH)), dtype)
    return lhs, (codes, jnp.asarray(scales, jnp.float8_e4m3fn), factor)


def cut(sizes):
    """Sizes as the definition wants them: those past the rows cut off."""
    ends = np.minimum(np.cumsum(sizes), ROWS)
    return jnp.asarray(np.diff(ends, prepend=0), jnp.int32)


def kernel(lhs, experts, sizes, activation):
    tables = experts.words, experts.scales, experts.factor, sizes
    return packed_tpu.matmul(lhs, *tables, activation=activation, interpret=True)


def xla(lhs, experts, sizes, activation):
    form = functools.partial(packed.grouped_matmul_packed, implementation="xla")
    return form(lhs, experts, sizes, activation=activation)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (kernel, jnp.float32),
        pytest.param(kernel, jnp.bfloat16, marks=pytest.mark.slow),
        (xla, jnp.float32),
        (xla, jnp.bfloat16),
    ],
)
def test_products_equal_the_definition(form, dtype):
    lhs, given = operands(dtype)
    experts = packed.pack_experts(*given)
    activation = "relu2" if dtype == jnp.float32 else None
    run = jax.jit(functools.partial(form, activation=activation))
    matrices = reference.dequantized(*given[:2])
    for name, sizes in PATTERNS.items():
        out = run(lhs, experts, jnp.asarray(sizes, jnp.int32))
        wide = lhs.astype(jnp.float32)
        expected = reference.grouped_matmul(wide, matrices, cut(sizes), given[2])
        expected = jnp.square(jnp.maximum(expected, 0)) if activation else expected
        assert_close(out, expected.astype(dtype), TOLERANCE[dtype], name)


@pytest.mark.parametrize("width", [250, 300])  # six columns fill its lanes; 84 would be too many
def test_columns_are_filled_where_few_are_missing(width):
    rng = np.random.default_rng(width)
    codes = jnp.asarray(rng.integers(0, 16, (EXPERTS, DEPTH, width)), jnp.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (EXPERTS, DEPTH // 16, width)), jnp.float8_e4m3fn)
    factor = jnp.asarray(rng.uniform(0.5, 2, EXPERTS), jnp.float32)
    experts = packed.pack_experts(codes, scales, factor)
    assert experts.words.shape[3] == experts.scales.shape[2] == {250: 256, 300: 300}[width]
    np.testing.assert_array_equal(experts.codes(), codes)
    matrices = reference.dequantized(codes, scales)
    steps = scales.astype(jnp.float32) * factor[:, None, None]
    whole = experts.matrices(jnp.float32)
    np.testing.assert_array_equal(whole, reference.dequantized(codes, steps))
    sizes = jnp.asarray(PATTERNS["rows past the sum"], jnp.int32)
    lhs = jnp.asarray(rng.standard_normal((ROWS, DEPTH)), jnp.float32)
    back = jnp.asarray(rng.standard_normal((ROWS, width)), jnp.float32)
    products = (
        (packed.grouped_matmul_packed, lhs, matrices),
        (
            packed.grouped_matmul_packed_transposed,
            back,
            jnp.swapaxes(matrices, 1, 2),
        ),
    )
    for product, rows, given in products:
        expected = reference.grouped_matmul(rows, given, sizes, factor)
        for form in ("xla", "reference"):
            out = product(rows, experts, sizes, implementation=form)
            assert_close(out, expected, 1e-5, f"{product.__name__} {form}")


def test_every_code_is_its_number_exactly():
    codes = jnp.arange(16, dtype=jnp.uint8)[None, :, None] * jnp.ones((1, 1, 8), jnp.uint8)
    scales = jnp.asarray([0, 2.0**-9, 0.013671875, 0.875, 1, 3.25, 15, 448], jnp.float8_e4m3fn)
    experts = packed.pack_experts(codes, scales[None, None], jnp.ones(1))
    run = jax.jit(functools.partial(xla, activation=None))
    out = run(jnp.eye(16), experts, jnp.asarray([16], jnp.int32))
    np.testing.assert_array_equal(out, reference.dequantized(codes, scales[None, None])[0])
    np.testing.assert_array_equal(experts.codes(), codes)


def test_quantised_experts_are_near_their_matrices_and_know_their_factors():
    rng = np.random.default_rng(0)
    sizes = 2.0 ** np.arange(2)[:, None, None]
    matrices = jnp.asarray(rng.standard_normal((2, 32, 48)) * sizes, jnp.float32)
    experts = jax.jit(packed.quantize_experts)(matrices)
    made = reference.dequantized(experts.codes(), experts.scales[:, :2])
    made *= experts.factor[:, None, None]
    # Half a step of E2M1 is up to a sixth of a block's largest number, a tenth of most.
    assert_close(made, matrices, 0.12, "matrices")


def test_a_kernel_that_ignores_signs_is_caught(monkeypatch):
    monkeypatch.setattr(packed_tpu, "SIGN", 0)
    lhs, given = operands()
    sizes = jnp.asarray(PATTERNS["rows past the sum"], jnp.int32)
    run = jax.jit(functools.partial(kernel, activation=None))
    out = run(lhs, packed.pack_experts(*given), sizes)
    expected = reference.grouped_matmul(lhs, reference.dequantized(*given[:2]), sizes, given[2])
    with pytest.raises(AssertionError, match="output"):
        assert_close(out, expected, 1e-5, "output")


def test_what_cannot_be_packed_or_run_says_so():
    _, (codes, scales, factor) = operands()
    with pytest.raises(ValueError, match="K=143 is not a multiple of 16"):
        packed.pack_experts(codes[:, 1:], scales, factor)
    with pytest.raises(ValueError, match="scales has shape"):
        packed.pack_experts(codes, scales[:, 1:], factor)
    experts = packed.pack_experts(codes, scales, factor)
    lhs, sizes = jnp.zeros((4, DEPTH)), jnp.zeros(EXPERTS, jnp.int32)
    with pytest.raises(ValueError, match="sides of 128 are the least"):
        packed.grouped_matmul_packed(lhs, experts, sizes, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="neither None nor 'relu2'"):
        packed.grouped_matmul_packed(lhs, experts, sizes, activation="relu")


def kernel_transposed(lhs, experts, sizes):
    tables = experts.words, experts.scales, experts.factor, sizes
    return packed_tpu.matmul_transposed(lhs, *tables, depth=DEPTH, interpret=True)


@pytest.mark.parametrize("form", [packed.grouped_matmul_packed_transposed, kernel_transposed])
def test_transposed_products_equal_the_definition(form):
    _, given = operands()
    experts = packed.pack_experts(*given)
    lhs = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, WIDTH)), jnp.float32)
    run = jax.jit(form)
    matrices = jnp.swapaxes(reference.dequantized(*given[:2]), 1, 2)
    for name, sizes in PATTERNS.items():
        out = run(lhs, experts, jnp.asarray(sizes, jnp.int32))
        expected = reference.grouped_matmul(lhs, matrices, cut(sizes), given[2])
        assert_close(out, expected, TOLERANCE[jnp.float32], name)
