"""A layer whose experts are spread over devices is the layer on one device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax import quant
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import MoEConfig
from nemotron_jax.config.precision import MXFP8, NVFP4
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.latent_moe import LatentMoE
from nemotron_jax.layers.low_rank import LowRank
from nemotron_jax.layers.packed import PackedMatrix
from nemotron_jax.quant import mix_emulated, windows
from nemotron_jax.quant.matmul import EXPERT_ROLES
from nemotron_jax.sharding import make_mesh
from nemotron_jax.sharding.weights import cuts_of
from nemotron_jax.types import Context, Rows, Weight
from tests.tiny_models import quick_jit

WIDTH, LENGTH, ROWS = 32, 12, 8
CONFIG = MoEConfig(
    num_experts=8, experts_per_token=2, expert_width=16, shared_width=16, latent_width=16
)
# Sums of a few hundred numbers of float32 that are made in another order.
LIMIT = 1e-6
CASES = {
    "expert": ((1, 1, 4), ROWS, "plain"),
    "data, fsdp and expert": ((2, 2, 2), ROWS, "plain"),
    "rows that expert does not divide": ((1, 2, 4), 2, "plain"),
    "adapters": ((1, 2, 2), ROWS, "adapters"),
    "all tokens to the experts of one device": ((1, 1, 4), ROWS, "crowded"),
    "nvfp4": ((1, 1, 4), ROWS, "nvfp4"),
}
MORE = {
    "data and expert": ((2, 1, 4), ROWS, "plain"),
    "fsdp and expert": ((1, 2, 4), ROWS, "plain"),
    "one row": ((2, 2, 2), 1, "plain"),
    "rows that fsdp does not divide": ((2, 4, 1), 2, "plain"),
    "adapters of 8": ((1, 1, 8), ROWS, "adapters"),
    "nvfp4 of 8": ((1, 1, 8), ROWS, "nvfp4"),
    "nvfp4 of rows that expert does not divide": ((1, 1, 4), 2, "nvfp4"),
}
# 8: room for the worst case, all rows of all devices.
WINDOWS = [((1, 1, 4), factor) for factor in (0.3, 1.0, 1.25, 8.0)]
WINDOWS += [((1, 1, 1), 0.3), ((1, 1, 8), 0.01)]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.more) for name in MORE)]
)
def test_a_layer_on_a_mesh_equals_one_device(case):
    sizes, rows, variant = (CASES | MORE)[case]
    expected, loads = on_mesh((1, 1, 1), rows, variant)
    got, own_loads = on_mesh(sizes, rows, variant)
    np.testing.assert_array_equal(own_loads, loads)
    assert_close(got, expected)


def assert_close(got: dict, expected: dict) -> None:
    for name, value in expected.items():
        gap = np.linalg.norm(got[name] - value) / (np.linalg.norm(value) + 1e-12)
        assert np.linalg.norm(value) > 0 and gap < LIMIT, (name, gap)


@pytest.mark.parametrize(
    ("sizes", "factor", "variant"),
    [
        ((1, 1, 4), 0.3, "crowded"),
        ((1, 1, 4), 0.3, "crowded nvfp4"),
        ((1, 1, 4), 0.3, "crowded packed"),
        pytest.param((1, 2, 2), 0.3, "crowded packed", marks=pytest.mark.more),
        *(
            pytest.param(sizes, factor, variant, marks=pytest.mark.more)
            for sizes, factor in WINDOWS
            for variant in ("crowded", "crowded nvfp4")
            if (sizes, factor) != ((1, 1, 4), 0.3)
        ),
        pytest.param((1, 1, 4), 0.3, "crowded mxfp8", marks=pytest.mark.more),
        pytest.param((1, 1, 4), 0.3, "crowded two formats", marks=pytest.mark.more),
        pytest.param((1, 1, 4), 0.3, "crowded odd widths", marks=pytest.mark.more),
    ],
)
def test_windows_of_any_size_give_the_same_numbers(sizes, factor, variant):
    expected, loads = on_mesh((1, 1, 1), ROWS, variant)
    got, own_loads = on_mesh(sizes, ROWS, variant, factor)
    np.testing.assert_array_equal(own_loads, loads)
    assert_close(got, expected)


@pytest.mark.more
def test_windows_on_other_meshes_give_what_all_rows_give_there():
    expected, loads = on_mesh((1, 2, 2), ROWS, "crowded nvfp4", 8.0)
    got, own_loads = on_mesh((1, 2, 2), ROWS, "crowded nvfp4", 0.3)
    np.testing.assert_array_equal(own_loads, loads)
    assert_close(got, expected)


@pytest.mark.more
def test_what_was_made_of_another_window_is_caught(monkeypatch):
    monkeypatch.setattr(mix_emulated.Held, "of", lambda held, window, make: held)
    expected, _ = on_mesh((1, 1, 1), ROWS, "crowded nvfp4")
    got, _ = on_mesh((1, 1, 4), ROWS, "crowded nvfp4", 0.299)  # compiled with the patch alone
    with pytest.raises(AssertionError, match="experts"):
        assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)])
def test_codes_of_a_mesh_differ_from_one_devices_by_noise_alone(sizes):
    ratio, share, error = noise_of_codes(sizes)
    # 1 where the mean of every element is zero but for its own noise, of 16 draws; an offset of a
    # quarter of the noise adds 1.
    assert 0.85 < ratio < 1.5, ratio
    assert abs(share) < 3 * error, (share, error)


def noise_of_codes(sizes: tuple[int, int, int], seeds: int = 16) -> tuple[float, float, float]:
    """Of the experts' gradients in NVFP4, a mesh's less one device's, over seeds of data and random
    bits: squared means over what their noise makes them, and the mean share of the gradient itself,
    in float32, that the difference holds, with its standard error."""
    layer = layer_of("nvfp4")
    exact, quantised = gradient((), 1.25), gradient(formats_of("nvfp4"), 1.25)
    differences, shares = [], []
    for seed in range(seeds):
        x, cotangent = normal(100 + seed, 2, ROWS, LENGTH, WIDTH)
        words = jnp.array([seed, 7], jnp.uint32)
        found = []
        for run, mesh in ((exact, (1, 1, 1)), (quantised, (1, 1, 1)), (quantised, sizes)):
            with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices())):
                (of_layer, _), _ = jax.device_get(run(layer, x, cotangent, words))
            named = by_name(of_layer)
            found.append(np.concatenate([named[f"experts.{n}"].ravel() for n in ("up", "down")]))
        itself, one, several = found
        differences.append(several - one)
        shares.append(np.dot(several - one, itself) / np.dot(itself, itself))
    mean, variance = np.mean(differences, 0), np.var(differences, 0, ddof=1)
    ratio = np.sum(mean**2) / np.sum(variance / seeds)
    return float(ratio), float(np.mean(shares)), float(np.std(shares, ddof=1) / math.sqrt(seeds))


def test_a_window_is_a_share_of_a_balanced_load_or_there_is_none():
    context = lambda factor: Context(Execution(expert_rows=factor), jnp.float32)
    assert quant.window_rows(8 * 8192 * 22, 8, context(1.25)) == 8192 * 22 * 5 // 4
    assert quant.window_rows(8192 * 22, 1, context(1.25)) is None  # one device has all
    assert quant.window_rows(800, 8, context(8.0)) is None
    assert quant.window_rows(800, 8, context(0.001)) == 8
    with pytest.raises(ValueError, match="Execution.expert_rows=0: must be positive"):
        context(0)


@pytest.mark.parametrize("rows", [7, 12, 24])
def test_a_windows_rows_are_added_piece_by_piece(monkeypatch, rows):
    monkeypatch.setattr(windows, "ADDED_ROWS", rows)
    rng = np.random.default_rng(0)
    token, holds = rng.integers(0, 5, 24), rng.random(24) < 0.8
    values, total = rng.standard_normal((24, 3)), rng.standard_normal((5, 3))
    window = windows.Window(jnp.int32(0), jnp.asarray(token), None, jnp.asarray(holds), None, None)
    found = jax.jit(lambda total, values: window.add(total, values))(total, values)
    np.add.at(total, token[holds], values[holds])
    np.testing.assert_allclose(found, total, rtol=1e-5, atol=1e-6)


def test_experts_stay_where_they_are_and_other_parts_travel():
    weight = Weight(jnp.zeros((8, 32, 48)), ("experts", "latent", "expert_hidden"))
    with jax.set_mesh(make_mesh(MeshConfig(expert=2, fsdp=2), jax.devices())):
        cuts = cuts_of(weight)
    assert cuts.gathered == ((0, ("fsdp",)),) and cuts.owners == ("expert",)
    # Devices that experts do not divide share the other axes, whose parts travel.
    with jax.set_mesh(make_mesh(MeshConfig(expert=4), jax.devices())):
        cuts = cuts_of(Weight(jnp.zeros((6, 32, 48)), weight.axes))
    assert cuts.gathered == ((1, ("expert",)),) and cuts.owners == ()


@functools.cache
def on_mesh(
    sizes: tuple[int, int, int], rows: int, variant: str, factor: float = 1.25
) -> tuple[dict, np.ndarray]:
    """Output, balance loss and every gradient by name, and the experts' loads."""
    mesh = MeshConfig(*sizes)
    layer, x, cotangent = layer_of(variant), *normal(0, 2, rows, LENGTH, WIDTH)
    with jax.set_mesh(make_mesh(mesh, jax.devices())):
        packed = "packed" in variant  # its codes have no gradient
        run = gradient(formats_of(variant), factor, (1,) if packed else (0, 1))
        words = jnp.array([1, 2], jnp.uint32)
        found, (y, metrics) = jax.device_get(run(layer, x, cotangent, words))
    *of_layer, of_x = found
    found = by_name(of_layer[0]) if of_layer else {}
    found |= {"x": of_x, "y": y, "aux_loss": metrics.aux_loss}
    return found, metrics.load


def by_name(layer: LatentMoE) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}


@functools.cache
def gradient(formats: tuple, factor: float, by: tuple[int, ...] = (0, 1)):
    """Of the sum of outputs times a cotangent, and of the balance loss, by the layer and x."""
    return quick_jit(jax.grad(functools.partial(loss, formats, factor), by, has_aux=True))


def formats_of(variant: str) -> tuple[tuple[str, str], ...]:
    """The formats of up and down."""
    if "two formats" in variant:
        return tuple(zip(EXPERT_ROLES, (NVFP4, MXFP8), strict=True))
    lower = {"nvfp4": NVFP4, "mxfp8": MXFP8, "odd widths": NVFP4}
    return tuple((role, lower[n]) for role in EXPERT_ROLES for n in lower if n in variant)


def loss(
    formats: tuple,
    factor: float,
    layer: LatentMoE,
    x: jax.Array,
    cotangent: jax.Array,
    words: jax.Array,
) -> tuple:
    rows, length = x.shape[:2]
    starts = np.random.default_rng(1).random((rows, length)) < 0.3
    starts[:, 0] = False
    valid = jnp.arange(length) < length - jnp.arange(rows)[:, None] % 3
    described = Rows(
        documents=jnp.cumsum(jnp.asarray(starts), axis=1),
        valid=valid,
        numbers=jnp.arange(rows * length).reshape(rows, length),
        words=words,
    )
    execution = Execution(aux_loss="documents", expert_rows=factor)
    context = Context(execution, jnp.float32, formats=formats, target="cpu")
    y, _, metrics = layer(x, described, None, context)
    return jnp.sum(y * cotangent) + metrics.aux_loss, (y, metrics)


def layer_of(variant: str) -> LatentMoE:
    odd = {"latent_width": 24, "expert_width": 40} if "odd widths" in variant else {}
    config = dataclasses.replace(CONFIG, **odd)
    layer = LatentMoE(config, WIDTH, Init(nnx.Rngs(0), 0.3, 0.3))
    if "crowded" in variant:
        bias = jnp.where(jnp.arange(8) == 5, 10.0, 0.0)  # every token's first choice
        layer.router.selection_bias[...] = bias
    if "packed" in variant:
        for name in ("up", "down"):
            matrices = PackedMatrix.of(getattr(layer.experts, name))
            matrices.is_base = True
            setattr(layer.experts, name, matrices)
    if variant == "adapters":
        experts = layer.experts
        for name, matrix in (("up_adapter", experts.up), ("down_adapter", experts.down)):
            count, rows, columns = matrix.shape
            (a,), (b,) = normal(1, 1, count, rows, 3), normal(2, 1, count, 3, columns)
            setattr(experts, name, nnx.data(LowRank(a, b, matrix.axes, 0.5)))
    return layer


def normal(seed: int, count: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *shape)), jnp.float32)
