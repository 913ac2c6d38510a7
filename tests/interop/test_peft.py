"""Adapters in PEFT's layout mean what they do there: W + alpha / r · B A, by the hub's names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.interop.hf_names import hub_tensors
from nemotron_jax.interop.peft import CONFIG_FILE, TENSOR_FILE, load_adapter, save_adapter
from nemotron_jax.model.adapters import add_adapters, is_adapter, merge_adapters
from nemotron_jax.model.parameters import flatten, unflatten
from tests.tiny_models import tiny_model

LORA = LoRAConfig(rank=3, alpha=5.0, targets=TARGETS)


@pytest.fixture(scope="module")
def base():
    return tiny_model("MEM*-E")


@pytest.fixture(scope="module")
def adapted(base):
    model = add_adapters(base, LORA, jax.random.key(2))
    draw = np.random.default_rng(3)
    table = {
        name: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32) if is_adapter(name) else leaf
        for name, leaf in flatten(model).items()
    }
    return unflatten(model, table)


@pytest.fixture(scope="module")
def written(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted, folder, base="some/model", layout="vllm")
    return folder


@pytest.fixture(scope="module")
def fused(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    with pytest.warns(UserWarning, match="PEFT refuses adapters of a Mamba layer's out_proj"):
        save_adapter(adapted, folder)
    return folder


def hub_table(model) -> dict[str, np.ndarray]:
    table = {name: np.asarray(leaf) for name, leaf in flatten(model).items()}
    return {t.name: t.to_hub(table) for t in hub_tensors(model.config, set(table))}


def test_the_files_say_what_merging_does(base, adapted, written) -> None:
    config = json.loads((written / CONFIG_FILE).read_text())
    factors = load_file(written / TENSOR_FILE)
    before, after = hub_table(base), hub_table(merge_adapters(adapted))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    owners = {key.rsplit(".lora_", 1)[0] for key in factors}
    assert {f"base_model.model.{name.removesuffix('.weight')}" for name in changed} == owners
    for name in changed:
        owner = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{owner}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == config["r"] == 3
        expected = before[name] + config["lora_alpha"] / config["r"] * (b @ a)
        np.testing.assert_allclose(after[name], expected, atol=1e-5)
    assert set(config["target_modules"]) == {owner.rsplit(".", 1)[1] for owner in owners}
    assert {"in_proj", "q_proj", "fc1_latent_proj"} < set(config["target_modules"])


def test_fused_experts_say_what_merging_does(base, adapted, fused, written) -> None:
    """By PEFT's formula of a parameter's change, the einsum of its ParamWrapper."""
    config = json.loads((fused / CONFIG_FILE).read_text())
    factors, single = load_file(fused / TENSOR_FILE), load_file(written / TENSOR_FILE)
    before, after = hub_table(base), hub_table(merge_adapters(adapted))
    assert config["target_parameters"] == ["mixer.experts.down_proj", "mixer.experts.up_proj"]
    assert {"mixer.up_proj", "shared_experts.up_proj"} < set(config["target_modules"])
    inner = {"up_proj": ".base_layer", "down_proj": ""}
    for layer, name in ((1, "up_proj"), (1, "down_proj"), (5, "up_proj"), (5, "down_proj")):
        module = f"layers.{layer}.mixer.experts"
        owner = f"base_model.model.backbone.{module}{inner[name]}"
        a, b = (factors.pop(f"{owner}.lora_{part}.weight") for part in "AB")
        experts = base.config.moe.num_experts
        a, b = a.reshape(experts, 3, -1), b.reshape(-1, 3, experts)
        change = 5.0 / 3 * np.einsum("ore,eri->eoi", b, a)
        for expert in range(experts):
            tensor = f"backbone.{module}.{expert}.{name}.weight"
            np.testing.assert_allclose(after[tensor], before[tensor] + change[expert], atol=1e-5)
    for key, factor in factors.items():
        assert np.array_equal(factor, single[key]), key


@pytest.mark.parametrize("layout", ["written", "fused"])
def test_reading_gives_back_what_was_written(base, adapted, layout, request) -> None:
    again = flatten(load_adapter(base, request.getfixturevalue(layout)))
    for name, leaf in flatten(adapted).items():
        assert np.array_equal(again[name], leaf), name


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"target_parameters": ["experts.down_proj"]}, None, "does not fit target_parameters"),
        ({"target_parameters": "experts.down_proj"}, None, "must be a list of names"),
        ({"r": 2}, None, "does not fit target_parameters=.*6 experts and rank 2"),
        (
            {},
            lambda t: {k.replace("q_proj", "q_proj.base_layer"): v for k, v in t.items()},
            "adapts a module twice",
        ),
    ],
)
def test_fused_experts_that_are_not_understood_are_refused(
    base, fused, tmp_path, config, tensors, words
) -> None:
    with pytest.raises(ValueError, match=words):
        load_adapter(base, rewritten(fused, tmp_path, config, tensors))


def test_an_unknown_layout_is_named(adapted, tmp_path) -> None:
    with pytest.raises(ValueError, match="layout='hub': must be one of peft, vllm"):
        save_adapter(adapted, tmp_path, layout="hub")


def rewritten(written, folder, change_config=None, change_tensors=None):
    config = json.loads((written / CONFIG_FILE).read_text())
    tensors = load_file(written / TENSOR_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config | (change_config or {})))
    save_file(change_tensors(tensors) if change_tensors else tensors, folder / TENSOR_FILE)
    return folder


def test_an_adapter_of_some_modules_under_transformers_names_is_read(
    base, adapted, written, tmp_path
) -> None:
    """Only one layer's in_proj, as transformers calls it, with rank-stabilised scaling."""

    def some(tensors):
        kept = {k: v for k, v in tensors.items() if "layers.2.mixer.in_proj" in k}
        return {k.replace(".backbone.", ".model."): v for k, v in kept.items()}

    folder = rewritten(written, tmp_path, {"use_rslora": True}, some)
    before, after = hub_table(base), hub_table(merge_adapters(load_adapter(base, folder)))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["backbone.layers.2.mixer.in_proj.weight"]
    factors = some(load_file(written / TENSOR_FILE))
    a, b = (factors[key] for key in sorted(factors))
    expected = before[changed[0]] + 5.0 / np.sqrt(3) * (b @ a)
    np.testing.assert_allclose(after[changed[0]], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"use_dora": True}, None, "use_dora=True is not understood"),
        ({"rank_pattern": {"q_proj": 8}}, None, "rank_pattern"),
        ({"alora_invocation_tokens": [3]}, None, "alora_invocation_tokens"),
        ({"r": 4}, None, "the model and rank need"),
        ({"r": "x"}, None, "cannot be read"),
        ({}, lambda t: t | {"base_model.model.lm_head.weight": np.ones(2)}, "is no LoRA factor"),
        ({}, lambda t: dict(list(t.items())[1:]), "has one factor"),
        (
            {},
            lambda t: {k.replace("layers.3.", "layers.9."): v for k, v in t.items()},
            "the model has no module for",
        ),
    ],
)
def test_adapters_that_are_not_understood_are_refused(
    base, written, tmp_path, config, tensors, words
) -> None:
    folder = rewritten(written, tmp_path, config, tensors)
    with pytest.raises(ValueError, match=words):
        load_adapter(base, folder)


def test_a_model_without_adapters_has_nothing_to_save(base, tmp_path) -> None:
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(base, tmp_path)
