"""The precision recipe: which matmul of which layer saw which format, and what follows from it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from configs import models
from nemotron_jax.config.convert import from_config_dict, to_config_dict
from nemotron_jax.config.precision import (
    HIGH,
    MXFP8,
    NVFP4,
    ROLES,
    NVFP4Config,
    PrecisionConfig,
    nemotron3_nvfp4,
)
from nemotron_jax.model.stack import UnitTable
from nemotron_jax.quant import emulated
from nemotron_jax.quant.operands import (
    DGRAD,
    FPROP,
    GRADIENT,
    INPUT,
    WEIGHT,
    WGRAD,
    Treatment,
)
from tests.tiny_models import quick_jit, random_tokens, tiny_config, tiny_model

KEY = jnp.array([1, 2], jnp.uint32)
SUPER = nemotron3_nvfp4(num_last_layers_high=14)
PATTERN, LAST = "MEM*EM-ME", 2
RECIPE = nemotron3_nvfp4(LAST)
PUBLISHED = {
    (FPROP, INPUT): Treatment(NVFP4, (1, 16), "nearest", False),
    (FPROP, WEIGHT): Treatment(NVFP4, (16, 16), "nearest", False),
    (DGRAD, GRADIENT): Treatment(NVFP4, (1, 16), "stochastic", False),
    (DGRAD, WEIGHT): Treatment(NVFP4, (16, 16), "nearest", False),
    (WGRAD, INPUT): Treatment(NVFP4, (16, 1), "nearest", True),
    (WGRAD, GRADIENT): Treatment(NVFP4, (16, 1), "stochastic", True),
}
MICROSCALED = {
    (FPROP, INPUT): Treatment(MXFP8, (1, 32)),
    (FPROP, WEIGHT): Treatment(MXFP8, (32, 1)),
    (DGRAD, GRADIENT): Treatment(MXFP8, (1, 32)),
    (DGRAD, WEIGHT): Treatment(MXFP8, (1, 32)),
    (WGRAD, INPUT): Treatment(MXFP8, (32, 1)),
    (WGRAD, GRADIENT): Treatment(MXFP8, (32, 1)),
}


def states(model, tokens, execution):
    return model(tokens, execution=execution, key=KEY).hidden


def loss(model, tokens, execution, key=KEY):
    output = model(tokens, execution=execution, key=key)
    mtp = model.mtp(output.hidden, tokens, 1, execution=execution).hidden
    return jnp.mean(jnp.square(output.hidden - 0.5)) + jnp.mean(jnp.square(mtp))


def execution(precision=RECIPE, **options):
    return nj.Execution(precision=precision, **options)


def test_a_spy_sees_each_operand_of_each_matmul_in_its_format(monkeypatch):
    seen = collections.defaultdict(dict)
    calls = collections.Counter()

    def spy(spec, x, product, side, *arguments, **options):
        treatment = emulated.treatments(spec.format, spec.options)[product, side]
        assert seen[spec.role].setdefault((product, side), treatment) == treatment
        calls[spec.role, product, side] += 1
        return operand(spec, x, product, side, *arguments, **options)

    operand = emulated._operand
    monkeypatch.setattr(emulated, "_operand", spy)
    model = tiny_model(PATTERN, "*E")
    run = lambda m: loss(m, random_tokens(0, 2, 9), execution(layers="unrolled"))
    jax.eval_shape(jax.grad(run), model)
    nvfp4_roles = {r for r in RECIPE.nvfp4_roles if r not in ("expert_up", "expert_down")}
    for role in (*nvfp4_roles, "expert_up", "expert_down"):
        assert seen.pop(role) == PUBLISHED, role
    assert seen.pop("mamba_out") == MICROSCALED
    assert not seen  # attention, latent projections, MTP and head never come here
    quantised = PATTERN[:-LAST]
    # z, x, B, C and dt are five matrices of one role, with the same input.
    for role, letter, count in (("mamba_in", "M", 5), ("mamba_out", "M", 1), ("expert_up", "E", 1)):
        layers = quantised.count(letter)
        assert calls[role, WGRAD, GRADIENT] == calls[role, DGRAD, WEIGHT] == count * layers
        assert calls[role, WGRAD, INPUT] == layers
    assert calls["mlp_up", DGRAD, GRADIENT] == 1


def test_a_stochastic_gradient_without_a_key_is_an_error():
    model = tiny_model("M-", seed=1)
    way = execution(nemotron3_nvfp4(0))
    run = lambda m: jnp.sum(m(random_tokens(0, 1, 4), execution=way).hidden)
    assert jax.eval_shape(run, model).shape == ()  # the forward pass draws nothing
    with pytest.raises(ValueError, match="rounded stochastically; pass key="):
        jax.eval_shape(jax.grad(run), model)


def test_activations_are_rounded_by_chance_where_a_model_learns_alone():
    model, tokens = tiny_model("M-E", seed=1), random_tokens(0, 1, 4)
    nearest = nemotron3_nvfp4(0)
    options = dataclasses.replace(
        nearest.nvfp4, activation_rounding="stochastic", gradient_rounding="nearest"
    )
    chance = dataclasses.replace(nearest, nvfp4=options)
    hidden = lambda way, **key: model(tokens, execution=execution(way), **key).hidden
    np.testing.assert_array_equal(hidden(chance), hidden(nearest))
    assert jnp.any(hidden(chance, key=jax.random.key(0)) != hidden(nearest))
    run = lambda m: jnp.sum(m(tokens, execution=execution(chance)).hidden)
    with pytest.raises(ValueError, match="rounded stochastically; pass key="):
        jax.eval_shape(jax.grad(run), model)


def test_supers_map_has_the_published_counts():
    pattern = models.SUPER_PATTERN
    formats = {
        role: [
            SUPER.format_of(role, layer, len(pattern))
            for layer, kind in enumerate(pattern)
            if kind == letter
        ]
        for role, letter in {
            "mamba_in": "M",
            "mamba_out": "M",
            "expert_up": "E",
            "expert_down": "E",
            "shared_up": "E",
            "shared_down": "E",
            "latent_down": "E",
            "latent_up": "E",
            "attention_q": "*",
            "attention_out": "*",
        }.items()
    }
    assert formats["mamba_in"] == [NVFP4] * 34 + [HIGH] * 6
    assert formats["mamba_out"] == [MXFP8] * 34 + [HIGH] * 6
    for role in ("expert_up", "expert_down", "shared_up", "shared_down"):
        assert formats[role] == [NVFP4] * 33 + [HIGH] * 7
    for role in ("latent_down", "latent_up", "attention_q", "attention_out"):
        assert set(formats[role]) == {HIGH}
    assert UnitTable.parse(pattern).runs(74) == [slice(0, 33), slice(33, 34), slice(34, 40)]
    assert UnitTable.parse(pattern).runs(88) == [slice(0, 40)]


@pytest.mark.parametrize(
    ("function", "remat"),
    [
        (states, "none"),
        pytest.param(jax.value_and_grad(loss), "full", marks=pytest.mark.more),
        pytest.param(jax.value_and_grad(loss), "none", marks=pytest.mark.slow),
    ],
    ids=["states", "gradients-full", "gradients-none"],
)
def test_a_scan_over_runs_of_layers_equals_the_layers_one_by_one(function, remat):
    model, tokens = tiny_model(PATTERN, "*E"), random_tokens(0, 2, 17)
    compiled = quick_jit(function, static_argnums=2)
    scan = execution(layers="scan", remat=remat)
    plain, one, scanned = (
        compiled(model, tokens, chosen)
        for chosen in (nj.Execution(), execution(layers="unrolled"), scan)
    )
    # Where float32 sums in another order a code may flip. That is little beside what quantising
    # does; another stream of random numbers, or another layer's format, is as much.
    for a, b, unquantised in zip(*(jax.tree.leaves(found) for found in (scanned, one, plain))):
        assert np.linalg.norm(a - b) <= 0.3 * np.linalg.norm(b - unquantised) + 1e-6


def test_all_layers_high_is_the_model_without_a_recipe():
    model, tokens = tiny_model(PATTERN, "*E"), random_tokens(0, 2, 9)
    compiled = quick_jit(loss, static_argnums=2)
    plain = compiled(model, tokens, nj.Execution())
    high = compiled(model, tokens, execution(nemotron3_nvfp4(len(PATTERN))))
    np.testing.assert_allclose(high, plain, rtol=1e-6)
    assert abs(compiled(model, tokens, execution()) - plain) > 1e-4


def test_gradients_depend_on_the_key_and_on_nothing_else():
    model, tokens = tiny_model(PATTERN, "*E"), random_tokens(0, 2, 9)
    gradient = quick_jit(jax.grad(loss), static_argnums=2)
    one, same, other = (
        jax.tree.leaves(gradient(model, tokens, execution(), key)) for key in (KEY, KEY, KEY + 1)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert sum(not np.array_equal(a, b) for a, b in zip(one, other)) > len(one) / 2


def test_every_layer_draws_its_own_numbers(monkeypatch):
    words = []
    dot = emulated.dot

    def keep(spec, x, weight, words_, *others):
        words.append(tuple(np.asarray(words_).tolist()))
        return dot(spec, x, weight, words_, *others)

    monkeypatch.setattr(emulated, "dot", keep)
    model = tiny_model("M-M-", seed=1)
    from nemotron_jax.model import nemotron

    with jax.disable_jit():
        nemotron._forward.__wrapped__(
            model,
            random_tokens(0, 1, 4),
            None,
            None,
            None,
            None,
            key=KEY,
            every_state=False,
            execution=execution(nemotron3_nvfp4(0), layers="unrolled"),
        )
    assert len(words) == 8 and len(set(words)) == 8


@pytest.mark.parametrize("step", [0, 99])
def test_before_the_switch_the_recipe_holds(step):
    recipe = dataclasses.replace(SUPER, switch_step=100)
    assert recipe.at_step(step) == SUPER


def test_after_the_switch_its_roles_change_format():
    everything = dataclasses.replace(SUPER, switch_step=100).at_step(100)
    assert not everything.nvfp4_roles and everything.mxfp8_roles == ("mamba_out",)
    some = dataclasses.replace(
        SUPER, switch_step=5, switch_format=MXFP8, switch_roles=("expert_up", "mamba_out")
    ).at_step(7)
    assert set(some.mxfp8_roles) == {"expert_up", "mamba_out"}
    assert set(some.nvfp4_roles) == set(SUPER.nvfp4_roles) - {"expert_up"}
    assert some.num_last_layers_high == 14 and some.switch_step == 0


def test_the_recipe_goes_through_run_files():
    config = nj.Execution(precision=SUPER)
    assert from_config_dict(nj.Execution, to_config_dict(config)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nvfp4_roles": ("mamba",)}, "'mamba'.*is not a weight matmul.*mamba_in"),
        ({"nvfp4_roles": ROLES[:1], "mxfp8_roles": ROLES[:1]}, "mamba_in cannot be in nvfp4_roles"),
        ({"num_last_layers_high": -1}, "num_last_layers_high=-1: must not be negative"),
        ({"switch_format": "nvfp4"}, "switch_format='nvfp4': must be one of high, mxfp8"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**options)
    with pytest.raises(ValueError, match="weight_block='2x2'"):
        NVFP4Config(weight_block="2x2")


def test_every_role_of_the_model_is_known_to_the_recipe():
    model = tiny_model(PATTERN, "*E")
    roles = {
        node.role
        for _, node in jax.tree_util.tree_flatten_with_path(
            model, is_leaf=lambda node: hasattr(node, "role")
        )[0]
        if hasattr(node, "role")
    }
    assert roles - {"head", "mtp_in"} <= set(ROLES)
    assert {"mamba_in", "mlp_up", "shared_down", "latent_up", "attention_q"} <= roles
    assert tiny_config(PATTERN).pattern == PATTERN
