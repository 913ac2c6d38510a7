"""PEFT puts our adapters on transformers' model, we put its on ours, and all say the same."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.interop.peft import load_adapter, save_adapter
from nemotron_jax.model.adapters import adapter_names, add_adapters, merge_adapters
from nemotron_jax.model.parameters import flatten, unflatten
from tests.tiny_models import VOCABULARY, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from tests.hf.theirs import load_theirs, our_logits, some_tokens, their_logits  # noqa: E402

pytestmark = pytest.mark.hf
TOKENS = some_tokens(VOCABULARY, 2, 21)
ATOL = 1e-4  # float32, as between the models without adapters


@pytest.fixture(scope="module")
def base():
    return tiny_model("ME*-M", mtp="*E")


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    nj.save_pretrained(base, folder, dtype="float32")
    return folder


def adapted(base, targets):
    """The model with adapters that change much: no factor is near zero."""
    model = add_adapters(base, LoRAConfig(rank=3, alpha=5.0, targets=targets), jax.random.key(2))
    draw, names = np.random.default_rng(3), adapter_names(model)
    table = {
        name: jnp.asarray(0.3 * draw.normal(size=leaf.shape), jnp.float32)
        if name in names
        else leaf
        for name, leaf in flatten(model).items()
    }
    return unflatten(model, table)


def allow_out_proj(monkeypatch):
    """PEFT refuses Mamba's out_proj, whose fused kernel passes adapters by; the plain one does
    not."""
    monkeypatch.setattr(
        peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None
    )


def assert_equal_and_changed(ours, theirs, base):
    expected = their_logits(theirs, TOKENS)
    np.testing.assert_allclose(our_logits(ours, TOKENS), expected, atol=ATOL)
    assert np.abs(our_logits(base, TOKENS) - expected).max() > 0.1


WITHOUT_OUT = tuple(target for target in TARGETS if target != "mamba_out")


@pytest.mark.parametrize(
    "targets", [WITHOUT_OUT, ("shared",), ("mlp", "experts"), TARGETS], ids=",".join
)
def test_peft_puts_our_adapter_on_transformers_model(
    base, exported, tmp_path, targets, monkeypatch
):
    model = adapted(base, targets)
    if "mamba_out" in targets:
        allow_out_proj(monkeypatch)
        with pytest.warns(UserWarning, match="PEFT refuses adapters of a Mamba layer's out_proj"):
            save_adapter(model, tmp_path, base=str(exported))
    else:
        save_adapter(model, tmp_path, base=str(exported))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).* adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(load_theirs(exported), tmp_path)
    assert_equal_and_changed(model, theirs, base)


def test_peft_still_refuses_out_proj(base, exported, tmp_path):
    """When this fails, the warning of save_adapter has become wrong."""
    with pytest.warns(UserWarning, match="out_proj"):
        save_adapter(adapted(base, ("mamba_out",)), tmp_path)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.PeftModel.from_pretrained(load_theirs(exported), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["in_proj", "q_proj", "o_proj", "shared_experts.down_proj"]},
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj", "mixer.experts.up_proj"],
        },
        {"target_modules": ["fc1_latent_proj"], "target_parameters": ["experts.up_proj"]},
        {"target_modules": ["mixer.up_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["v_proj"], "use_rslora": True},
    ],
    ids=lambda settings: "+".join(sum((v for v in settings.values() if v is not True), [])),
)
def test_an_adapter_that_peft_wrote_is_read(base, exported, tmp_path, settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(load_theirs(exported), config)
    with torch.no_grad():  # PEFT draws small factors, and zeros on parameters
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base, tmp_path)
    assert_equal_and_changed(ours, theirs, base)
    save_adapter(ours, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["r"] == 4
    again = load_adapter(base, tmp_path / "again")
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(ours, TOKENS))


def test_transformers_reads_a_merged_model(base, tmp_path):
    model = adapted(base, TARGETS)
    nj.save_pretrained(merge_adapters(model), tmp_path, dtype="float32")
    assert_equal_and_changed(model, load_theirs(tmp_path), base)
