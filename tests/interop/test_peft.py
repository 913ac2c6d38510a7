"""Adapters in PEFT's layout mean what they do there: W + alpha / r · B A, by the hub's names."""

import json
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.interop.hf_names import hub_tensors
from nemotron_jax.interop.peft import TENSOR_FILE, load_adapter, save_adapter
from nemotron_jax.interop.peft_checks import warn_of_other_base
from nemotron_jax.interop.peft_config import CONFIG_FILE, read_adapter_config
from nemotron_jax.model.adapters import adapter_names, add_adapters, merge_adapters
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.types import Origin
from tests.tiny_models import tiny_model

LORA = LoRAConfig(rank=3, alpha=5.0, targets=TARGETS)


@pytest.fixture(scope="module")
def base():
    return tiny_model("MEM*-E")


@pytest.fixture(scope="module")
def adapted(base):
    model = add_adapters(base, LORA, jax.random.key(2))
    draw, names = np.random.default_rng(3), adapter_names(model)
    table = {
        name: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32) if name in names else leaf
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
        ({"target_parameters": 7}, None, "must be a list of names"),
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

    chosen = {"use_rslora": True, "layers_to_transform": 2, "target_modules": ["mixer.in_proj"]}
    folder = rewritten(written, tmp_path, chosen, some)
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
        ({"r": "x"}, None, "r='x' must be an integer"),
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


# What PEFT 0.15 writes where nothing is asked for, and what later versions added, by version.
WRITTEN_BY_PEFT = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "some/model",
    "bias": "none", "corda_config": None, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 5.0, "lora_bias": False, "lora_dropout": 0.05,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "r": 3, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_dora": False, "use_rslora": False,
}  # fmt: skip
ADDED = {
    "0.17": {"target_parameters": None, "use_qalora": False, "qalora_group_size": 16},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "peft_version": "0.18.1",
             "ensure_weight_tying": False},
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
    "0.21": {"velora_config": None, "monteclora_config": None, "kasa_config": None},
}  # fmt: skip


def read(folder, settings):
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    return read_adapter_config(folder / CONFIG_FILE)


def test_what_every_version_of_peft_writes_is_read(tmp_path) -> None:
    settings = dict(WRITTEN_BY_PEFT)
    assert read(tmp_path, settings).modules == ("q_proj",)
    for added in ADDED.values():
        settings |= added
        assert read(tmp_path, settings).rank == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"corda_config": {"corda_method": "ipm"}},  # of a start that was converted to plain LoRA
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5.0}},
        {"task_type": None, "auto_mapping": {"base_model_class": "NemotronHForCausalLM"}},
        {"a_setting_of_tomorrow": None, "another": False, "a_third": {}},
    ],
    ids=str,
)
def test_settings_that_change_no_output_are_read(tmp_path, settings) -> None:
    assert read(tmp_path, WRITTEN_BY_PEFT | settings).alpha == 5.0


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": kind} for kind in (
            "pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", 7)),
        {"use_qalora": True}, {"use_bdlora": {"nblocks": 2}}, {"arrow_config": {"top_k": 3}},
        {"kasa_config": {"a": 1}}, {"monteclora_config": {"num_samples": 8}},
        {"a_setting_of_tomorrow": 1}, {"another": "on"}, {"a\nthird": [0]},
        {"task_type": "SEQ_CLS"}, {"layers_pattern": "blocks"}, {"lora_bias": True},
        {"rank_pattern": {"q_proj": 3, "k_proj": 4}}, {"alpha_pattern": {"q_proj": 6.0}},
        {"r": 3.7}, {"r": True}, {"r": 2**40}, {"r": None}, {"lora_alpha": 10**400},
        {"lora_alpha": "5"}, {"lora_alpha": 1e308, "r": 1}, {"lora_dropout": 7},
        {"use_rslora": "no"}, {"layers_to_transform": "2"}, {"layers_to_transform": [2.5]},
        {"target_modules": {"q_proj": 1}}, {"target_modules": [7]}, {"target_parameters": [None]},
    ],
    ids=lambda settings: str(settings)[:50],
)  # fmt: skip
def test_settings_that_may_change_an_output_are_refused_by_name(tmp_path, settings) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, WRITTEN_BY_PEFT | settings)
    text = str(caught.value)
    assert str(tmp_path / CONFIG_FILE) in text and len(text.splitlines()) == 1
    assert any(repr(name)[1:-1] in text for name in settings)


def of_some(words):
    return lambda t: {k: v for k, v in t.items() if any(word in k for word in words)}


def with_value(value):
    return lambda t: t | {"base_model.model.backbone.layers.3.mixer.q_proj.lora_B.weight": np.full(
        (20, 3), value, np.float32)}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (
            {},
            of_some([f"layers.{n}." for n in (0, 1, 2)]),
            "modules that adapter_config.json names",
        ),
        ({}, of_some(["q_proj"]), "have no factors"),
        ({}, lambda t: {k: v for k, v in t.items() if "experts.4." not in k}, "experts.4."),
        ({"exclude_modules": ["q_proj"]}, None, "does not name, layers.3.mixer.q_proj"),
        ({"target_modules": "nothing"}, None, "does not name"),
        ({"target_modules": []}, None, "does not name"),
        ({"layers_to_transform": [0]}, None, "does not name"),
        ({"r": 10**9}, None, "the model and rank need"),
        ({}, with_value(np.nan), "layers.3.mixer.q_proj.* holds NaN or infinity"),
        ({}, with_value(-np.inf), "layers.3.mixer.q_proj.* holds NaN or infinity"),
        ({}, lambda t: {k: v.astype(np.int8) for k, v in t.items()}, "is no LoRA factor"),
    ],
)
def test_files_that_are_not_what_their_settings_say_are_refused(
    base, written, tmp_path, config, tensors, words
) -> None:
    folder = rewritten(written, tmp_path, config, tensors)
    with pytest.raises(ValueError, match=words):
        load_adapter(base, folder)


def test_fused_experts_of_every_layer_are_needed(base, fused, tmp_path) -> None:
    folder = rewritten(fused, tmp_path, None, lambda t: {
        k: v for k, v in t.items() if "layers.5.mixer.experts.lora" not in k})  # fmt: skip
    with pytest.raises(ValueError, match=r"layers.5.mixer.experts.0.down_proj for one"):
        load_adapter(base, folder)


def test_modules_of_a_pattern_cannot_be_listed_and_uneven_layers_are_a_warning(
    base, written, tmp_path
) -> None:
    pattern = {"target_modules": r"(a+)+\.(q|in)_proj", "base_model_name_or_path": ""}
    folder = rewritten(written, tmp_path, pattern, of_some(["0.mixer.in_proj", "q_proj"]))
    with pytest.warns(UserWarning, match=r"1 modules .* layers.2.mixer.in_proj for one"):
        load_adapter(base, folder)


def test_a_pickle_is_not_read(base, written, tmp_path) -> None:
    folder = rewritten(written, tmp_path)
    (folder / TENSOR_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        load_adapter(base, folder)


@pytest.mark.parametrize(
    ("base", "home", "warned"),
    [
        ("meta/llama", "/models/nano", True),
        ("meta/llama", "", True),
        ("", "/models/nano", False),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "/models/nano", False),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "/m/NVIDIA-Nemotron-3-Super-120B", True),
        ("nvidia/Nano-30B-BF16", "/m/Nano-30B-Base-BF16", True),
        ("nvidia/Nano-30B-BF16", "/cache/models--nvidia--Nano-30B-BF16/snapshots/0a1b", False),
    ],
)
def test_an_adapter_of_another_model_is_a_warning(base, home, warned, tmp_path) -> None:
    origin = Origin(home, "float32", hub=home) if home else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_base(base, origin, tmp_path)
    assert [str(tmp_path) in str(w.message) for w in caught] == [True] * warned
