"""Emulated products are those of operands quantised apart, in each direction as it should be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemotron_jax.config.precision import NVFP4Config
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.quant import emulated
from nemotron_jax.quant.operands import DGRAD, GRADIENT, INPUT, WGRAD, stream
from nemotron_jax.sharding import make_mesh
from nemotron_jax.sharding.weights import Cuts
from pallas_kernels import nvfp4
from tests.tiny_models import quick_jit

WORDS = jnp.array([3, 4], jnp.uint32)
F32 = 1e-5  # the same products, summed in another order
VARIANTS = {
    "recipe": NVFP4Config(),
    "nearest gradients": NVFP4Config(gradient_rounding="nearest"),
    "no transform": NVFP4Config(hadamard=False),
    "weights by rows": NVFP4Config(weight_block="1x16"),
    "stochastic activations": NVFP4Config(activation_rounding="stochastic"),
}


def dot(spec, x, weights, words, rows):
    """The products, without codes of the weights that were made beforehand."""
    return emulated.dot(spec, x, weights, words, rows, (None,) * len(weights))


def spec(format="nvfp4", options=None):
    return emulated.Spec("shared_up", format, options or NVFP4Config(), (jnp.dtype(jnp.float32),))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(actual, expected):
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < F32, error


def value_and_pull(product, x, w, dy):
    """The product and its gradients, compiled together."""

    @quick_jit
    def run(x, w, dy):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    return run(x, w, dy)


@functools.partial(quick_jit, static_argnames=("block", "rounding"))
def back_and_forth(x, block=(1, 16), rounding="nearest", key=None):
    """x quantised to codes along its rows, and dequantised."""
    return nvfp4.dequantize(nvfp4.quantize(x, block=block, rounding=rounding, key=key))


@quick_jit
def turned(x):
    return nvfp4.hadamard(x).astype(jnp.float32)  # [columns, rows]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_product_is_that_of_its_own_operands(name):
    options = VARIANTS[name]
    x, w, dy = normal(0, 64, 48), normal(1, 48, 80), normal(2, 64, 80)
    product = lambda x, w: dot(spec(options=options), x, (w,), WORDS, jnp.arange(64))[0]
    y, dx, dw = value_and_pull(product, x, w, dy)
    square = {"block": (16, 16) if options.weight_block == "16x16" else (1, 16)}

    def rounded(product, side, rounding):
        return {"rounding": rounding, "key": stream(WORDS, product, side)}

    activation = rounded("fprop", INPUT, options.activation_rounding)
    close(y, back_and_forth(x, **activation) @ back_and_forth(w.T, **square).T)
    gradient = rounded(DGRAD, GRADIENT, options.gradient_rounding)
    close(dx, back_and_forth(dy, **gradient) @ back_and_forth(w, **square).T)
    if "stochastic" in (options.activation_rounding,) or options.gradient_rounding == "stochastic":
        return  # there the copies along tokens draw by row and column: see below
    xt, dyt = (turned(a) if options.hadamard else a.T for a in (x, dy))
    close(dw, back_and_forth(xt) @ back_and_forth(dyt).T)


@pytest.mark.parametrize("hadamard", [True, False])
def test_the_weight_gradient_draws_by_token_and_column(hadamard):
    x, w, dy = normal(0, 64, 48), normal(1, 48, 80), normal(2, 64, 80)
    options = NVFP4Config(hadamard=hadamard)
    product = lambda x, w: dot(spec(options=options), x, (w,), WORDS, jnp.arange(64))[0]
    _, _, dw = value_and_pull(product, x, w, dy)
    left, right = (turned(a) if hadamard else a.T for a in (x, dy))
    drawn = nvfp4.round_trip(
        right.T, block=(16, 1), rounding="stochastic", words=stream(WORDS, WGRAD, GRADIENT)
    )
    close(dw, back_and_forth(left) @ (drawn * (jnp.max(jnp.abs(right)) / 2688)))


def test_the_two_copies_of_a_gradient_are_rounded_independently():
    words = [stream(WORDS, product, GRADIENT) for product in (DGRAD, WGRAD)]
    dy = normal(0, 64, 64)
    options = {"block": (1, 16), "rounding": "stochastic"}
    one, two = (nvfp4.round_trip(dy, words=w, **options) for w in words)
    exact = dy / (jnp.max(jnp.abs(dy)) / 2688)
    noise = [np.asarray(copy - exact).ravel() for copy in (one, two)]
    assert abs(np.corrcoef(noise)[0, 1]) < 5 / 64 and all(n.any() for n in noise)


def test_mxfp8_products_are_those_of_its_values():
    x, w, dy = normal(0, 64, 96), normal(1, 96, 32), normal(2, 64, 32)
    product = lambda x, w: dot(spec("mxfp8"), x, (w,), WORDS, jnp.arange(64))[0]
    y, dx, dw = value_and_pull(product, x, w, dy)

    @quick_jit
    def mx(a):
        values, exponents = nvfp4.quantize_mxfp8(a)
        scale = jnp.repeat(2.0 ** (exponents.astype(jnp.float32) - 127), 32, axis=1)
        return values.astype(jnp.float32) * scale

    close(y, mx(x) @ mx(w.T).T)
    close(dx, mx(dy) @ mx(w).T)
    close(dw, mx(x.T) @ mx(dy.T).T)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_odd_sizes_are_padded_with_zeros(format):
    x, w, dy = normal(0, 37, 21), normal(1, 21, 9), normal(2, 37, 9)
    grown = [jnp.pad(a, [(0, -s % 32) for s in a.shape]) for a in (x, w, dy)]
    rows = jnp.concatenate([jnp.arange(37), ~jnp.arange(27)])
    product = lambda x, w: dot(spec(format), x, (w,), WORDS, rows[: x.shape[0]])[0]
    narrow, wide = value_and_pull(product, x, w, dy), value_and_pull(product, *grown)
    for part, whole in zip(narrow, wide):
        assert part.any()
        close(part, whole[: part.shape[0], : part.shape[1]])


SIZES = (32, 0, 16, 48, 0)  # multiples of 16, as groups are; two experts without a row


@pytest.mark.parametrize("name", VARIANTS)
def test_every_expert_is_a_tensor_of_its_own(name):
    x, w, dy = normal(0, 112, 32), normal(1, 5, 32, 48), normal(2, 112, 48)
    x = x * (jnp.arange(112)[:, None] < 96)  # rows past all groups are zeros
    chosen = spec(options=VARIANTS[name])
    rows = 7 + 3 * jnp.arange(112)

    def grouped(x, w):
        return emulated.grouped_dot(chosen, x, w, jnp.array(SIZES), WORDS, rows)

    y, dx, dw = value_and_pull(grouped, x, w, dy)
    start = 0
    assert not y[96:].any() and not dx[96:].any()
    for expert, size in enumerate(SIZES):
        part = slice(start, start + size)
        start += size
        if not size:
            assert not dw[expert].any()
            continue
        alone = lambda x, w, part=part: dot(chosen, x, (w,), WORDS, rows[part])[0]
        wanted = value_and_pull(alone, x[part], w[expert], dy[part])
        for got, want in zip((y[part], dx[part], dw[expert]), wanted):
            close(got, want)


def test_a_nan_reaches_the_product_and_its_gradients():
    x, w = normal(0, 32, 32).at[3, 5].set(jnp.nan), normal(1, 32, 32)
    product = lambda x, w: dot(spec(), x, (w,), WORDS, jnp.arange(32))[0]
    y, _, dw = value_and_pull(product, x, w, jnp.ones((32, 32)))
    assert np.isnan(y[3]).all() and np.isnan(dw).any()


def test_operands_are_exact_in_bfloat16():
    """So that a product on bfloat16 hardware is the emulated one but for the order of its sums."""
    x, w = normal(0, 32, 64).astype(jnp.bfloat16), normal(1, 64, 32)
    product = quick_jit(lambda x: dot(spec(), x, (w,), WORDS, jnp.arange(32))[0])
    close(product(x), product(x.astype(jnp.float32)))


@pytest.mark.parametrize("cut", [0, 2])
def test_experts_that_devices_share_are_quantised_as_one_device_quantises_them(cut):
    x, w, dy = normal(0, 112, 32), normal(1, 4, 32, 64), normal(2, 112, 64)
    sizes, rows = jnp.array([32, 0, 16, 48]), jnp.arange(112)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices())

    def grouped(cuts, x, w, dy):
        chosen = dataclasses.replace(spec(), cuts=cuts)
        product = lambda x, w: emulated.grouped_dot(chosen, x, w, sizes, WORDS, rows)
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    part = PartitionSpec(*(None,) * cut, "fsdp")
    whole = PartitionSpec()
    options = {"in_specs": (whole, part, whole), "out_specs": (whole, whole, part)}
    options |= {"mesh": mesh, "check_vma": False}
    shared = quick_jit(
        jax.shard_map(functools.partial(grouped, Cuts(((cut, ("fsdp",)),))), **options)
    )
    found = shared(x, w, dy)
    expected = quick_jit(functools.partial(grouped, Cuts()))(x, w, dy)
    for got, value in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(got, value)
    close(found[2], 4 * expected[2])  # every device has the same rows
