"""A layer whose experts are spread over devices is the layer on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax import quant
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import MoEConfig
from nemotron_jax.config.precision import NVFP4
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.layers.latent_moe import LatentMoE
from nemotron_jax.layers.low_rank import LowRank
from nemotron_jax.quant.matmul import EXPERT_ROLES
from nemotron_jax.sharding import cuts_of, make_mesh
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
    ("sizes", "factor"),
    [
        ((1, 1, 4), 0.3),
        pytest.param((1, 1, 1), 0.3, marks=pytest.mark.more),
        pytest.param((1, 1, 4), 1.0, marks=pytest.mark.more),
        pytest.param((1, 1, 8), 0.01, marks=pytest.mark.more),
        pytest.param((1, 1, 8), 8.0, marks=pytest.mark.more),
    ],
)
def test_windows_of_any_size_give_the_same_numbers(sizes, factor):
    expected, loads = on_mesh((1, 1, 1), ROWS, "crowded")
    got, own_loads = on_mesh(sizes, ROWS, "crowded", factor)
    np.testing.assert_array_equal(own_loads, loads)
    assert_close(got, expected)


def test_a_window_is_a_share_of_a_balanced_load_or_there_is_none():
    context = lambda factor: Context(Execution(expert_rows=factor), jnp.float32)
    assert quant.window_rows(8 * 8192 * 22, 8, context(1.25)) == 8192 * 22 * 5 // 4
    assert quant.window_rows(8192 * 22, 1, context(1.25)) is None  # one device has all
    assert quant.window_rows(800, 8, context(8.0)) is None
    assert quant.window_rows(800, 8, context(0.001)) == 8
    with pytest.raises(ValueError, match="Execution.expert_rows=0: must be positive"):
        context(0)


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
        run = gradient(NVFP4 if variant == "nvfp4" else "", factor)
        (of_layer, of_x), (y, metrics) = jax.device_get(run(layer, x, cotangent))
    state = nnx.to_flat_state(nnx.state(of_layer, nnx.Param))
    found = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    found |= {"x": of_x, "y": y, "aux_loss": metrics.aux_loss}
    return found, metrics.load


@functools.cache
def gradient(format: str, factor: float):
    """Of the sum of outputs times a cotangent, and of the balance loss."""
    return quick_jit(jax.grad(functools.partial(loss, format, factor), (0, 1), has_aux=True))


def loss(format: str, factor: float, layer: LatentMoE, x: jax.Array, cotangent: jax.Array) -> tuple:
    rows, length = x.shape[:2]
    starts = np.random.default_rng(1).random((rows, length)) < 0.3
    starts[:, 0] = False
    valid = jnp.arange(length) < length - jnp.arange(rows)[:, None] % 3
    described = Rows(
        documents=jnp.cumsum(jnp.asarray(starts), axis=1),
        valid=valid,
        numbers=jnp.arange(rows * length).reshape(rows, length),
        words=jnp.array([1, 2], jnp.uint32),
    )
    formats = tuple((role, format) for role in EXPERT_ROLES if format)
    execution = Execution(aux_loss="documents", expert_rows=factor)
    context = Context(execution, jnp.float32, formats=formats, target="cpu")
    y, _, metrics = layer(x, described, None, context)
    return jnp.sum(y * cotangent) + metrics.aux_loss, (y, metrics)


def layer_of(variant: str) -> LatentMoE:
    layer = LatentMoE(CONFIG, WIDTH, std=0.3, out_std=0.3, rngs=nnx.Rngs(0))
    if variant == "crowded":
        bias = jnp.where(jnp.arange(8) == 5, 10.0, 0.0)  # every token's first choice
        layer.router.selection_bias[...] = bias
    if variant == "adapters":
        experts = layer.experts
        for name, matrix in (("up_adapter", experts.up), ("down_adapter", experts.down)):
            count, rows, columns = matrix.shape
            (a,), (b,) = normal(1, 1, count, rows, 3), normal(2, 1, count, 3, columns)
            setattr(experts, name, nnx.data(LowRank(a, b, matrix.axes, 0.5)))
    return layer


def normal(seed: int, count: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *shape)), jnp.float32)
