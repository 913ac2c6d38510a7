"""Directories as users have them: stale shards, several end tokens, strange dtypes, quantised."""

import json
import os
import shutil
import stat

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
    with pytest.raises(ValueError, match="tensor 'w' has dtype 'U32', which no model here"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_a_recipe_without_codes_is_refused_by_name(hub, where):
    if where == "config.json":
        edit(hub / where, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    else:
        (hub / where).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(ValueError, match=rf"{where} says .* quantised \(FP8\), and .* no matrix"):
        nj.load_pretrained(hub)


def test_codes_without_a_recipe_are_no_weights(hub):
    tensors = load_file(hub / "model.safetensors")
    name = "backbone.layers.0.mixer.out_proj.weight"
    save_file({**tensors, name: tensors[name].astype(np.int8)}, hub / "model.safetensors")
    with pytest.raises(ValueError, match=f"'{name}' is stored as int8, codes that mean nothing"):
        nj.load_pretrained(hub)


def rename_tensors(hub, rename):
    tensors = load_file(hub / "model.safetensors")
    save_file({rename(n): a for n, a in tensors.items()}, hub / "model.safetensors")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "language_model." + name,
        lambda name: name.replace("backbone.", "model.", 1),
        lambda name: "language_model." + name.replace("backbone.", "model.", 1),
    ],
)
def test_other_prefixes_are_read_as_the_hub_s(hub, rename):
    expected = load_file(hub / "model.safetensors")["backbone.embeddings.weight"]
    rename_tensors(hub, rename)
    np.testing.assert_array_equal(nj.load_pretrained(hub).embedding[...], expected)


def test_an_unknown_prefix_is_named(hub):
    rename_tensors(hub, lambda name: "transformer." + name)
    with pytest.raises(ValueError, match="and not with transformer."):
        nj.load_pretrained(hub)


@pytest.mark.parametrize("spelling", ["torch.float32", "fp32", "auto", None])
def test_every_spelling_of_the_stored_dtype_is_read(hub, spelling):
    edit(hub / "config.json", dtype=None, torch_dtype=spelling)
    model = nj.load_pretrained(hub, dtype=None)
    assert model.origin.dtype == "float32" and model.head.weight[...].dtype == np.float32


def test_dtypes_that_no_matrix_is_held_in_are_named(hub, tmp_path):
    model = nj.load_pretrained(hub, dtype="torch.bfloat16")
    assert model.head.weight[...].dtype == nj.load_pretrained(hub, "bf16").head.weight[...].dtype
    for wrong in ("fp8", "int8", "bfloat", 8):
        with pytest.raises(ValueError, match=r"load_pretrained.dtype=.*must be one of float32"):
            nj.load_pretrained(hub, dtype=wrong)
        with pytest.raises(ValueError, match=r"save_pretrained.dtype=.*must be one of float32"):
            nj.save_pretrained(model, tmp_path / "out", dtype=wrong)
    with pytest.raises(ValueError, match=r"save_pretrained: .* layout='training'"):
        nj.save_pretrained(nj.for_decoding(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edit(hub / "config.json", dtype="int4")
    with pytest.raises(ValueError, match=r"config.json.dtype='int4'"):
        nj.load_pretrained(hub)


def test_mtp_can_be_left_out_of_files_that_hold_it_and_that_lack_it(tmp_path):
    hub = shutil.copytree(GOLDEN / "hybrid_moe_latent" / "checkpoint", tmp_path / "hub")
    assert nj.load_pretrained(hub).mtp_block is not None
    dropped = nj.load_pretrained(hub, mtp="drop")
    assert dropped.mtp_block is None and dropped.config.mtp is None
    tensors = load_file(hub / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    assert len(kept) < len(tensors)
    save_file(kept, hub / "model.safetensors")
    with pytest.raises(ValueError, match="mtp='drop'.*num_nextn_predict_layers to 0"):
        nj.load_pretrained(hub)
    nj.save_pretrained(nj.load_pretrained(hub, mtp="drop"), tmp_path / "again")
    assert nj.load_pretrained(tmp_path / "again").config == dropped.config
    with pytest.raises(ValueError, match="mtp='no' *: must be one of keep, drop"):
        nj.load_pretrained(hub, mtp="no")


def test_an_export_can_be_read_by_all_and_by_older_readers(hub, tmp_path):
    model = nj.load_pretrained(hub)
    nj.save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    usual = tmp_path / "usual"
    usual.touch()
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode), file.name
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755


def test_a_path_that_is_a_file_is_refused_before_anything_is_written(hub, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="save_pretrained: .*file.*name a directory"):
            nj.save_pretrained(nj.load_pretrained(hub), path)
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "hub"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff", "null"])
def test_a_broken_json_file_is_named(hub, name, text):
    (hub / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=name):
        nj.load_pretrained(hub)


@pytest.mark.parametrize("path", ["", ".", "..", "below/.."])
def test_the_working_directory_is_never_replaced(hub, tmp_path, monkeypatch, path):
    model = nj.load_pretrained(hub)
    inside = tmp_path / "inside"
    (inside / "below").mkdir(parents=True)
    (inside / "mine.safetensors").touch()
    monkeypatch.chdir(inside)
    with pytest.raises(ValueError, match="holds the working directory"):
        nj.save_pretrained(model, path, dtype="float32")
    assert (inside / "mine.safetensors").exists()


def test_a_run_is_not_overwritten_by_a_model(hub, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a run's directory"):
        nj.save_pretrained(nj.load_pretrained(hub), tmp_path / "run", dtype="float32")


def test_a_config_nested_without_end_is_named(hub):
    (hub / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        nj.load_pretrained(hub)
