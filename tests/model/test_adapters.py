"""Adapters change nothing at first, learn alone, and merge into the matrices they are beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.model.adapters import (
    adapter_sites,
    add_adapters,
    has_adapters,
    is_adapter,
    merge_adapters,
)
from nemotron_jax.model.parameters import flatten, unflatten
from tests.tiny_models import quick_jit, random_tokens, tiny_model

ALL = LoRAConfig(rank=3, alpha=6.0, targets=TARGETS)
TOKENS = jnp.asarray(random_tokens(0, 2, 19))


@pytest.fixture(scope="module")
def base():
    return tiny_model("MEM*-")


@pytest.fixture(scope="module")
def adapted(base):
    """Adapters of every kind with random factors, B's too."""
    model = add_adapters(base, ALL, jax.random.key(1))
    draw = np.random.default_rng(0)
    table = {
        name: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32)
        if is_adapter(name)
        else leaf
        for name, leaf in flatten(model).items()
    }
    return unflatten(model, table)


@quick_jit
def hidden(model):
    return model(TOKENS).hidden


def test_new_adapters_change_no_output_and_leave_the_model_alone(base) -> None:
    before = set(flatten(base))
    model = add_adapters(base, ALL, jax.random.key(0))
    assert np.array_equal(hidden(model), hidden(base))
    assert set(flatten(base)) == before and not has_adapters(base) and has_adapters(model)
    assert not any(is_adapter(name) for name in before)


def test_merged_equals_unmerged(base, adapted) -> None:
    """Float32 rounding alone: the outputs are of order one."""
    merged = merge_adapters(adapted)
    assert set(flatten(merged)) == set(flatten(base)) and not has_adapters(merged)
    assert np.abs(hidden(adapted) - hidden(base)).max() > 0.1
    np.testing.assert_allclose(hidden(merged), hidden(adapted), atol=1e-4)


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_every_adapter_gets_a_gradient_and_its_matrix_moves(base, adapted, layers: str) -> None:
    table = flatten(adapted)
    adapters = {name: leaf for name, leaf in table.items() if is_adapter(name)}

    def loss(adapters):
        model = unflatten(adapted, table | adapters)
        return jnp.sum(model(TOKENS, execution=Execution(layers=layers)).hidden ** 2)

    gradients = quick_jit(jax.grad(loss))(adapters)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name
    moved = flatten(merge_adapters(adapted))
    sites = {site.name for site in adapter_sites(base)}
    for name, leaf in flatten(base).items():
        assert (not np.array_equal(leaf, moved[name])) == (name in sites), name


def test_each_target_reaches_its_matrices_alone(base) -> None:
    for target in TARGETS:
        model = add_adapters(base, LoRAConfig(rank=2, targets=(target,)), jax.random.key(0))
        names = {name for name in flatten(model) if is_adapter(name)}
        sites = [site for site in adapter_sites(base) if site.target == target]
        assert len(sites) > 0
        factors = sum(1 if site.shares else 2 for site in sites)
        assert len(names) == factors, target


def test_a_model_without_the_targets_and_wrong_targets_are_refused(base) -> None:
    with pytest.raises(ValueError, match="has none of these"):
        add_adapters(tiny_model("M*E"), LoRAConfig(targets=("mlp",)), jax.random.key(0))
    with pytest.raises(ValueError, match="targets=.'gate_proj'"):
        LoRAConfig(targets=("gate_proj",))
