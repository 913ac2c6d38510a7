"""NVFP4 and MXFP8 equal the golden arrays bit for bit, and keep the bounds of their arithmetic."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import nvfp4
from pallas_kernels.nvfp4 import random, reference, xla

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nvfp4" / "golden.npz")
CASES = json.loads(GOLDEN["meta_json"].tobytes())["cases"]
# Subnormal float32 is flushed by XLA and not by the oracle; a NaN is everybody's own.
FINITE = [name for name in CASES if name not in ("min_normal_f32", "subnormal_f32", "one_nan_f32")]
IMPLEMENTATIONS = ("xla", "reference")
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
BLOCKS = {"te1d": (1, 16), "te2d": (16, 16)}


def cases_with(key: str) -> list[str]:
    return [name for name in FINITE if f"{name}/{key}" in GOLDEN.files]


def golden_input(name: str) -> jax.Array:
    x = GOLDEN[f"{name}/x"]
    return jnp.asarray(x.view(ml_dtypes.bfloat16) if CASES[name]["dtype"] == "bfloat16" else x)


def run(jitted: bool, function, *arrays):
    return (jax.jit(function) if jitted else function)(*arrays)


def data(shape, seed=0, scale=1.0):
    """Normal numbers whose rows differ in size by powers of two."""
    rng = np.random.default_rng(seed)
    spread = 2.0 ** rng.integers(-3, 4, (shape[0], 1))
    return (scale * rng.standard_normal(shape) * spread).astype(np.float32)


# Compiled, XLA brings scalars together that the eager form leaves apart: the slow tests see both.
JITTED = pytest.mark.parametrize(
    "jitted",
    [pytest.param(True, id="jit"), pytest.param(False, id="eager", marks=pytest.mark.slow)],
)


@JITTED
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("flavour", BLOCKS)
def test_codes_and_scales_are_the_golden_ones(flavour, implementation, jitted):
    assert len(cases_with(f"{flavour}_packed")) >= 17
    for name in cases_with(f"{flavour}_packed"):
        quantize = lambda x: nvfp4.quantize(x, block=BLOCKS[flavour], implementation=implementation)
        q = run(jitted, quantize, golden_input(name))
        np.testing.assert_array_equal(q.codes, GOLDEN[f"{name}/{flavour}_packed"], err_msg=name)
        scales = np.asarray(q.scales).view(np.uint8)
        np.testing.assert_array_equal(scales, GOLDEN[f"{name}/{flavour}_scale_u8"], err_msg=name)
        np.testing.assert_array_equal(q.amax, GOLDEN[f"{name}/amax"][0], err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scales_at_ties_round_by_the_published_chain_of_products(implementation):
    """Blocks whose scale lies within float32 steps of a tie, where the order of rounding shows.

    Eagerly too: compiling, XLA itself brings the scalars of a product together.
    """
    grid = np.arange(0x40, 0x7E, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ties = (grid[1:] + grid[:-1]) / 2
    others_differ = 0
    for amax in np.float32([3.3, 0.77, 19.1, 1234.5]):
        encode = np.float32(2688) / amax
        at_tie = (ties * 6 / np.float64(encode)).astype(np.float32)
        steps = np.arange(-4, 5, dtype=np.int32)[:, None]
        largest = (at_tie.view(np.int32) + steps).view(np.float32).ravel()
        blocks = np.zeros((largest.size + 1, 16), np.float32)
        blocks[:, 3] = np.append(largest, amax)
        chain = blocks[:, 3] * (encode * np.float32(1 / 6))
        expected = np.minimum(chain, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        for jitted in (True, False):
            quantize = lambda x: nvfp4.quantize(x, implementation=implementation)
            scales = np.asarray(run(jitted, quantize, jnp.asarray(blocks)).scales)
            np.testing.assert_array_equal(scales.view(np.uint8)[:, 0], expected)
        twice = np.minimum(blocks[:, 3] / np.float32(6) * encode, 448)
        others_differ += np.sum(twice.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) != expected)
    assert others_differ > 0  # or these blocks would show nothing


@JITTED
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_hadamard_transform_is_the_golden_one(implementation, jitted):
    assert len(cases_with("rht_t_bf16")) == 4
    for name in cases_with("rht_t_bf16"):
        transform = lambda x: nvfp4.hadamard(x, implementation=implementation)
        y = run(jitted, transform, golden_input(name))
        np.testing.assert_array_equal(np.asarray(y).view(np.uint16), GOLDEN[f"{name}/rht_t_bf16"])
        q = run(jitted, lambda y: nvfp4.quantize(y, implementation=implementation), y)
        np.testing.assert_array_equal(q.codes, GOLDEN[f"{name}/rht_te1d_packed"])
        np.testing.assert_array_equal(q.amax, GOLDEN[f"{name}/rht_amax"][0])


@JITTED
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mxfp8_is_the_golden_one(implementation, jitted):
    assert len(cases_with("mxfp8_rceil_data_u8")) == 5
    for name in cases_with("mxfp8_rceil_data_u8"):
        quantize = lambda x: nvfp4.quantize_mxfp8(x, implementation=implementation)
        values, exponents = run(jitted, quantize, golden_input(name))
        expected = GOLDEN[f"{name}/mxfp8_rceil_data_u8"]
        np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected, err_msg=name)
        np.testing.assert_array_equal(exponents, GOLDEN[f"{name}/mxfp8_rceil_scale_u8"])


def test_every_cast_of_the_table_is_right():
    """A second element of 6 and an amax of 2688 make the block's scale 448 and its factor 1/448."""
    inputs, codes = GOLDEN["e2m1/in"], GOLDEN["e2m1/code"]
    keep = np.isfinite(inputs) & (np.abs(inputs) <= 6)
    blocks = np.zeros((keep.sum(), 16), np.float32)
    blocks[:, 0], blocks[:, 1] = inputs[keep], 6
    blocks *= 448
    q = nvfp4.quantize(jnp.asarray(blocks))
    np.testing.assert_array_equal(np.asarray(nvfp4.unpack(q.codes))[:, 0], codes[keep])


@pytest.mark.parametrize("block", [(1, 16), (16, 1), (16, 16)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_fast_form_equals_the_definition(block, rounding):
    x, key = data((48, 64)), jax.random.key(3)
    options = {"block": block, "rounding": rounding, "key": key}
    fast = nvfp4.quantize(x, **options, implementation="xla")
    slow = nvfp4.quantize(x, **options, implementation="reference")
    np.testing.assert_array_equal(fast.codes, slow.codes)
    np.testing.assert_array_equal(
        np.asarray(fast.scales).view(np.uint8), np.asarray(slow.scales).view(np.uint8)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_round_trip_is_quantising_and_dequantising(rounding, implementation):
    x, words = data((32, 48)), jnp.array([7, 9], jnp.uint32)
    options = {"block": (1, 16), "rounding": rounding}
    q = nvfp4.quantize(x, **options, key=words)
    operand = nvfp4.round_trip(x, **options, words=words, implementation=implementation)
    np.testing.assert_array_equal(operand.astype(jnp.bfloat16).astype(jnp.float32), operand)
    np.testing.assert_array_equal(operand * (q.amax / 2688), nvfp4.dequantize(q))


@pytest.mark.parametrize("block", [(1, 16), (16, 1)])
def test_tensors_lying_one_after_another_keep_their_own_scales(block):
    """Compiled, where XLA would divide by a number that is repeated as if by its inverse."""
    sizes = (30, 7, 13, 900)  # largest magnitudes whose inverses are not exact
    # In bfloat16, where elements lie at ties.
    tensors = [jnp.asarray(data((32, 256), seed), jnp.bfloat16) for seed in range(len(sizes))]
    amax = jnp.repeat(jnp.float32(sizes), 2)[:, None]
    trip = functools.partial(nvfp4.round_trip, block=block, implementation="xla")
    both = jax.jit(lambda x, amax: trip(x, amax=amax))(jnp.concatenate(tensors), amax)
    apart = [
        nvfp4.round_trip(x, block=block, amax=jnp.float32(size), implementation="reference")
        for x, size in zip(tensors, sizes, strict=True)
    ]
    np.testing.assert_array_equal(both, np.concatenate(apart))


def test_mxfp8_round_trips_are_its_values_times_its_exponents():
    x = data((64, 96)) * np.float32(2.0) ** np.arange(-20, 76)[None]
    values, exponents = nvfp4.quantize_mxfp8(x)
    scale = np.repeat(2.0 ** (np.asarray(exponents, np.float64) - 127), 32, axis=1)
    expected = np.asarray(values, np.float64) * scale
    rows = nvfp4.round_trip_mxfp8(x, block=(1, 32))
    np.testing.assert_array_equal(np.asarray(rows, np.float64), expected)
    columns = nvfp4.round_trip_mxfp8(jnp.asarray(x).T, block=(32, 1))
    np.testing.assert_array_equal(columns.T, rows)


def steps_and_errors(x, rounding, block=(1, 16)):
    q = nvfp4.quantize(x, block=block, rounding=rounding, key=jax.random.key(0))
    step = xla.spread(q.scales.astype(jnp.float32) * (q.amax / 2688), block)
    return np.asarray(step), np.abs(np.asarray(nvfp4.dequantize(q)) - np.asarray(x))


def test_rounding_errs_by_no_more_than_its_step():
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    step, error = steps_and_errors(x, "nearest")
    largest = np.asarray(xla.spread(xla.block_amax(jnp.asarray(x), (1, 16)), (1, 16)))
    # Half of the widest spacing, 2, but for a scale rounded up by 1/17 at most: 1.0588 / 6.
    assert (error <= step * (1 + 1e-6)).all() and (error <= 0.1765 * largest).all()
    top = np.abs(x) == largest
    assert (error[top] <= 0.0589 * largest[top]).all()
    decibels = 10 * np.log10(np.mean(x**2) / np.mean(error**2))
    assert 20.2 < decibels < 20.6  # 20.4 for normal numbers
    step, error = steps_and_errors(x, "stochastic")
    assert (error <= 2 * step * (1 + 1e-6)).all()
    assert 17.0 < 10 * np.log10(np.mean(x**2) / np.mean(error**2)) < 17.5


def test_stochastic_rounding_is_unbiased_and_hits_both_neighbours():
    value = np.linspace(-6, 6, 97, dtype=np.float32)
    draws = 4096
    tile = np.full((draws, 97 * 16), 6, np.float32)  # so every block's scale is 448
    tile[:, ::16] = value
    operand = nvfp4.round_trip(
        tile, block=(1, 16), rounding="stochastic", words=jnp.array([1, 2], jnp.uint32)
    )
    drawn = np.asarray(operand)[:, ::16] / 448
    assert np.isin(np.abs(drawn), GRID).all() and np.any(drawn)
    low = GRID[np.searchsorted(GRID, np.abs(value), side="right") - 1]
    high = GRID[np.minimum(np.searchsorted(GRID, np.abs(value)), 7)]
    fraction = np.where(high > low, (np.abs(value) - low) / np.maximum(high - low, 1e-9), 0)
    error = np.sqrt(fraction * (1 - fraction) / draws) * (high - low)
    assert (np.abs(drawn.mean(0) - value) <= 5 * error + 1e-6).all()
    between = (fraction > 0.1) & (fraction < 0.9)
    assert (drawn[:, between].std(0) > 0).all()


def test_random_bits_are_uniform_and_streams_independent():
    words = jnp.array([5, 11], jnp.uint32)
    streams = [words, nvfp4.fold(words, 1), nvfp4.fold(words, 2), words + jnp.uint32(1)]
    drawn = [np.asarray(random.uniform(w, jnp.arange(512), 512)) for w in streams]
    for u in drawn:
        counts = np.histogram(u, 256, (0, 1))[0]
        expected = u.size / 256
        chi2 = np.sum((counts - expected) ** 2 / expected)  # 255 degrees: 255 ± 5 * sqrt(510)
        assert 142 < chi2 < 368
        assert u.min() >= 0 and u.max() < 1
    limit = 5 / 512  # five standard errors of a correlation of 512² pairs
    shifted = [np.roll(drawn[0], shift, axis) for shift in (1, 16) for axis in (0, 1)]
    diagonal = np.roll(drawn[0], (1, 1), (0, 1))
    for other in (*drawn[1:], *shifted, diagonal, drawn[0].T.copy()):
        off = ~np.eye(512, dtype=bool) if np.array_equal(other, drawn[0].T) else slice(None)
        assert abs(np.corrcoef(drawn[0][off].ravel(), other[off].ravel())[0, 1]) < limit
        assert np.mean(drawn[0][off] == other[off]) < 1e-4


def test_random_bits_follow_the_global_row():
    words, rows = jnp.array([5, 11], jnp.uint32), jnp.array([7, 3, 100])
    some = random.uniform(words, rows, 20)
    np.testing.assert_array_equal(some, random.uniform(words, jnp.arange(128), 20)[rows])
    x = data((128, 32))
    options = {"block": (1, 16), "rounding": "stochastic", "words": words}
    whole = nvfp4.round_trip(x, **options)
    part = nvfp4.round_trip(x[64:], **options, rows=64 + jnp.arange(64), amax=np.abs(x).max())
    np.testing.assert_array_equal(part, whole[64:])


def test_square_blocks_quantise_a_matrix_and_its_transpose_alike():
    x = data((64, 48))
    q, t = (nvfp4.quantize(a, block=(16, 16)) for a in (x, x.T))
    np.testing.assert_array_equal(nvfp4.dequantize(q).T, nvfp4.dequantize(t))
    q, t = (nvfp4.quantize(a, block=(1, 16)) for a in (x, x.T))
    assert not np.array_equal(nvfp4.dequantize(q).T, nvfp4.dequantize(t))


def test_the_hadamard_transform_is_orthogonal_and_cancels():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16) for _ in range(2))
    turned = [nvfp4.hadamard_rows(x).astype(jnp.float32) for x in (a, b)]
    np.testing.assert_array_equal(turned[0], nvfp4.hadamard(a).T.astype(jnp.float32))
    matrix = nvfp4.hadamard(jnp.eye(16)).astype(jnp.float32)
    np.testing.assert_array_equal(matrix @ matrix.T, jnp.eye(16))
    product = a.astype(jnp.float32).T @ b.astype(jnp.float32)
    # Each side is rounded to bfloat16 once more: 2**-9 of it.
    error = jnp.linalg.norm(turned[0].T @ turned[1] - product) / jnp.linalg.norm(product)
    assert error < 2**-8


def test_the_transform_keeps_small_values_from_being_flushed():
    x = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    x[::16] *= 100
    small = np.arange(256) % 16 > 0
    plain = np.asarray(nvfp4.round_trip(x, block=(16, 1)))
    turned = np.asarray(nvfp4.round_trip(nvfp4.hadamard_rows(x), block=(16, 1)))
    assert np.mean(plain[small] == 0) > 0.7 and np.mean(turned == 0) < 0.1


@pytest.mark.parametrize("block", [(1, 16), (16, 1), (16, 16)])
def test_zeros_stay_zeros_and_nan_spreads(block):
    x = data((32, 32))
    x[:16, :16] = 0
    for rounding in ("nearest", "stochastic"):
        options = {"block": block, "rounding": rounding, "key": jax.random.key(0)}
        back = np.asarray(nvfp4.dequantize(nvfp4.quantize(x, **options)))
        assert not back[:16, :16].any() and back[16:].any()
        assert not np.any(nvfp4.dequantize(nvfp4.quantize(np.zeros((16, 16)), **options)))
    for position in ((0, 0), (20, 20)):
        spoiled = x.copy()
        spoiled[position] = np.nan
        assert np.isnan(nvfp4.dequantize(nvfp4.quantize(spoiled, block=block))[position])
        assert np.isnan(nvfp4.round_trip(jnp.asarray(spoiled), block=block)[position])


def test_packing_keeps_every_code_with_the_even_column_low():
    codes = jnp.arange(32, dtype=jnp.uint8).reshape(2, 16) % 16
    packed = nvfp4.pack(codes)
    np.testing.assert_array_equal(packed[0, :2], [0x10, 0x32])
    np.testing.assert_array_equal(nvfp4.unpack(packed), codes)
    np.testing.assert_array_equal(np.asarray(xla.values(codes[:1, :8]))[0], GRID)


def test_padding_is_cut_off_again():
    x = data((19, 21))
    q = nvfp4.quantize(x, block=(16, 16), pad=True)
    assert q.codes.shape == (32, 16) and q.scales.shape == (2, 2)
    whole = nvfp4.quantize(jnp.pad(x, ((0, 13), (0, 11))), block=(16, 16))
    np.testing.assert_array_equal(nvfp4.dequantize(q), nvfp4.dequantize(whole)[:19, :21])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": (1, 32)}, r"block=\(1, 32\) is not one of"),
        ({"rounding": "up"}, "rounding='up' is neither"),
        ({"rounding": "stochastic"}, "pass a key"),
        ({"rounding": "stochastic", "key": np.zeros(3, np.uint32)}, "two words"),
        ({"implementation": "cuda"}, "'cuda' does not exist"),
        ({"block": (16, 16)}, "R=24 is not a multiple of the block's 16; .*pad=True"),
    ],
)
def test_wrong_calls_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        nvfp4.quantize(np.ones((24, 32), np.float32), **options)
    with pytest.raises(ValueError, match="hadamard: R=24"):
        nvfp4.hadamard(np.ones((24, 32), np.float32))


def test_the_definition_rounds_as_the_grid_says():
    """Halfway, below and above each pair of neighbours; even codes win ties."""
    for code in range(7):
        low, high = GRID[code], GRID[code + 1]
        middle = np.float32((low + high) / 2)
        even = low if code % 2 == 0 else high
        around = jnp.array([np.nextafter(middle, 0), middle, np.nextafter(middle, 9)], jnp.float32)
        np.testing.assert_array_equal(reference.nearest(around), [low, even, high])
