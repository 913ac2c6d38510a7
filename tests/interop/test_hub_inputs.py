"""Directories as users have them: stale shards, several end tokens, strange dtypes, quantised."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nemotron_jax as nj
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from tests.golden_cases import GOLDEN


@pytest.fixture
def hub(tmp_path):
    return shutil.copytree(GOLDEN / "dense" / "checkpoint", tmp_path / "hub")


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_tensor_in_two_shards_is_read_where_the_index_says(hub):
    tensors = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").unlink()
    name = "backbone.embeddings.weight"
    save_file(tensors, hub / "a.safetensors")
    owner = dict.fromkeys(tensors, "a.safetensors")
    other = next(n for n in tensors if n != name)
    save_file({name: np.zeros_like(tensors[name]), other: tensors[other]}, hub / "b.safetensors")
    index = {"weight_map": owner | {other: "b.safetensors"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(nj.load_pretrained(hub).embedding[...], tensors[name])


def test_end_tokens_of_the_config_are_kept(hub, tmp_path):
    (hub / "generation_config.json").unlink()
    edit(hub / "config.json", eos_token_id=[2, 11])
    model = nj.load_pretrained(hub)
    assert model.origin.stop_tokens == (2, 11)
    nj.save_pretrained(model, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 11]


@pytest.mark.parametrize("eos", [[2, None], "2", 2.5])
def test_a_wrong_end_token_names_its_file(hub, eos):
    edit(hub / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id="):
        nj.load_pretrained(hub)


def test_an_unknown_dtype_is_named(tmp_path):
    save_file({"w": np.zeros(4, np.uint32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor w has dtype U32, which no model here"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_a_quantised_checkpoint_is_refused_by_name(hub, where):
    if where == "config.json":
        edit(hub / where, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    else:
        (hub / where).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(ValueError, match=rf"is quantised \(FP8, {where}\)"):
        nj.load_pretrained(hub)
