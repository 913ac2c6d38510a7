"""Adapters beside NVFP4 codes train as on the floats that the codes stand for, on meshes too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.model.adapters import adapter_names, add_adapters
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.sharding import make_mesh
from tests.golden_cases import GOLDEN
from tests.tiny_models import quick_jit

SUPER = GOLDEN.parent / "quantised" / "super_nvfp4"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 144, (4, 9)))
LORA = LoRAConfig(rank=2, targets=tuple(t for t in TARGETS if t != "mlp"))


def with_adapters(model: nj.Nemotron) -> nj.Nemotron:
    """The model with adapters that change something: B is drawn too."""
    model = add_adapters(model, LORA, jax.random.key(1))
    table = flatten(model)
    for number, name in enumerate(sorted(adapter_names(model))):
        key = jax.random.key(number)
        table[name] = 0.2 * jax.random.normal(key, table[name].shape, table[name].dtype)
    return unflatten(model, table)


def gradients(model: nj.Nemotron) -> dict[str, jax.Array]:
    table, names = flatten(model), adapter_names(model)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal((4, 9, 48)), jnp.float32)

    def loss(adapters):
        return jnp.sum(unflatten(model, table | adapters)(TOKENS).hidden * direction)

    return quick_jit(jax.grad(loss))({name: table[name] for name in names})


def assert_near(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(found) > 20
    for name, leaf in expected.items():
        norm = float(jnp.linalg.norm(leaf))
        assert norm > 0, name
        # The factor multiplies sums here and weights there; the bound is that of float32 gradients
        # against the independent references.
        assert float(jnp.linalg.norm(found[name] - leaf)) <= 5e-4 * norm, name


@pytest.mark.more
def test_adapters_gradients_are_those_on_the_dequantised_base() -> None:
    """In one process: on one device, and on a mesh whose devices hold half of the codes each."""
    packed = with_adapters(nj.load_pretrained(SUPER, experts="nvfp4"))
    expected = gradients(nj.unpacked(packed))
    assert_near(gradients(packed), expected)
    for axis in ("expert", "fsdp"):
        mesh = make_mesh(MeshConfig(**{axis: 2}), jax.devices()[:2])
        placed = nj.load_pretrained(SUPER, experts="nvfp4", mesh=mesh, layout="training")
        words = placed.moe.mixer.experts.up.words[...]
        assert words.sharding.shard_shape(words.shape)[1] * 2 == words.shape[1], axis
        with jax.set_mesh(mesh):
            assert_near(gradients(with_adapters(placed)), expected)


def test_codes_of_themselves_have_no_gradient() -> None:
    packed = add_adapters(nj.load_pretrained(SUPER, experts="nvfp4"), LORA, jax.random.key(1))
    table = flatten(packed)

    def loss(factor):
        model = unflatten(packed, table | {"moe.mixer.experts.up.factor": factor})
        return jnp.sum(model(TOKENS).hidden)

    with pytest.raises(ValueError, match="experts.up are NVFP4 codes, through which no gradient"):
        jax.eval_shape(jax.grad(loss), table["moe.mixer.experts.up.factor"])
