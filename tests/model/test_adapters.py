"""Adapters change nothing at first, learn alone, and merge into the matrices they are beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.config.precision import ROLES
from nemotron_jax.layers import linear as linear_module
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear
from nemotron_jax.layers.low_rank import LowRank
from nemotron_jax.model.adapters import (
    adapter_names,
    adapter_sites,
    add_adapters,
    has_adapters,
    merge_adapters,
)
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.types import Context, Rows
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
    draw, names = np.random.default_rng(0), adapter_names(model)
    table = {
        name: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32) if name in names else leaf
        for name, leaf in flatten(model).items()
    }
    return unflatten(model, table)


@quick_jit
def hidden(model):
    return model(TOKENS).hidden


def test_new_adapters_change_no_output_and_leave_the_model_alone(base) -> None:
    before = set(flatten(base))
    model = add_adapters(base, ALL, jax.random.key(0))
    # Two compiled programs, whose fusions may round their sums apart.
    np.testing.assert_allclose(hidden(model), hidden(base), atol=2e-6)
    assert set(flatten(base)) == before and not has_adapters(base) and has_adapters(model)
    assert not adapter_names(base) and adapter_names(model) == set(flatten(model)) - before


def test_merged_equals_unmerged(base, adapted) -> None:
    """Float32 rounding alone: the outputs are of order one."""
    merged = merge_adapters(adapted)
    assert set(flatten(merged)) == set(flatten(base)) and not has_adapters(merged)
    assert np.abs(hidden(adapted) - hidden(base)).max() > 0.1
    np.testing.assert_allclose(hidden(merged), hidden(adapted), atol=1e-4)


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_every_adapter_gets_a_gradient_and_its_matrix_moves(base, adapted, layers: str) -> None:
    table = flatten(adapted)
    adapters = {name: leaf for name, leaf in table.items() if name in adapter_names(adapted)}

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
        names = adapter_names(model)
        sites = [site for site in adapter_sites(base) if site.target == target]
        assert len(sites) > 0
        factors = sum(1 if site.shares else 2 for site in sites)
        assert len(names) == factors, target


def test_a_model_without_the_targets_and_wrong_targets_are_refused(base) -> None:
    with pytest.raises(ValueError, match="has none of these"):
        add_adapters(tiny_model("M*E"), LoRAConfig(targets=("mlp",)), jax.random.key(0))
    with pytest.raises(ValueError, match="targets=.'gate_proj'"):
        LoRAConfig(targets=("gate_proj",))


def test_dropout_leaves_out_its_share_by_the_number_of_a_token() -> None:
    """Zero weight, and factors that are the identity: the product is what the adapter was given."""
    linear = Linear("mamba_out", ("width", "width"), (40, 40), Init(nnx.Rngs(0), 0.0, 0.0))
    eye = jnp.eye(40)
    linear.adapter = nnx.data(LowRank(eye, eye, ("width", "width"), 1.0, dropout=0.25))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, 40)), jnp.float32)
    numbers, words = jnp.arange(100).reshape(2, 50), jnp.array([3, 4], jnp.uint32)
    context = Context(Execution(), jnp.float32)
    run = lambda x, **rows: np.asarray(linear(x, context, Rows(**rows)))
    np.testing.assert_allclose(run(x), x, atol=1e-6)  # no words: not in training
    dropped = run(x, words=words, numbers=numbers)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.asarray(x / 0.75)[kept], rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / kept.size)
    half = run(x[1:], words=words, numbers=numbers[1:])
    np.testing.assert_array_equal(half, dropped[1:])
    assert not np.array_equal(kept, run(x, words=words + 1, numbers=numbers) != 0)


def test_dropout_reaches_every_linear_and_no_expert(base, monkeypatch) -> None:
    found, dropped = set(), linear_module._dropped

    def recorded(x, adapter, role, rows):
        assert adapter.dropout == 0.5
        assert rows.words is not None and rows.numbers is not None
        found.add(role)
        return dropped(x, adapter, role, rows)

    monkeypatch.setattr(linear_module, "_dropped", recorded)
    targets = tuple(target for target in TARGETS if target != "experts")
    model = add_adapters(base, LoRAConfig(targets=targets, dropout=0.5), jax.random.key(0))
    jax.eval_shape(lambda model, key: model(TOKENS, key=key).hidden, model, jax.random.key(1))
    experts = {"expert_up", "expert_down"}
    assert found == {role for role in ROLES if role != "head"} - experts
    with pytest.raises(ValueError, match="dropout=0.1: must be 0 with the target experts"):
        LoRAConfig(targets=TARGETS, dropout=0.1)
    with pytest.raises(ValueError, match="dropout=1: must be at least 0 and below 1"):
        LoRAConfig(dropout=1)
