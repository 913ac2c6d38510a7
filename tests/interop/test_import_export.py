"""Import and export of hub directories: identity, faults by name, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nemotron_jax as nj
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.interop.hf_export import save_hub
from nemotron_jax.model.parameters import flatten
from tests.golden_cases import CASES, GOLDEN, model
from tests.tiny_models import quick_jit, tiny_model

LATENT = GOLDEN / "hybrid_moe_latent" / "checkpoint"
BIAS = "e_score_correction_bias"
EXCEPTION = "backbone.layers.2.mixer.A_log"  # float32 in a checkpoint of bfloat16
HALF = np.dtype(ml_dtypes.bfloat16)


def tensors_of(directory) -> dict[str, np.ndarray]:
    return {
        k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def assert_same_tensors(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


def write_checkpoint(directory, tensors, *, shards=1, dtype="float32") -> None:
    """A hub directory with the golden latent model's config and these tensors, dealt to shards."""
    directory.mkdir(exist_ok=True)
    config = json.loads((LATENT / "config.json").read_text()) | {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    place = {
        name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors"
        for n, name in enumerate(sorted(tensors))
    }
    for file in set(place.values()):
        save_file({n: a for n, a in tensors.items() if place[n] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def half_checkpoint(tmp_path):
    """The hub's own layout: bfloat16 in shards with an index, selection biases float32."""
    tensors = {
        name: array if name.endswith(BIAS) or name == EXCEPTION else array.astype(HALF)
        for name, array in tensors_of(LATENT).items()
    }
    write_checkpoint(tmp_path / "half", tensors, shards=3, dtype="bfloat16")
    (tmp_path / "half" / "tokenizer.json").write_text('{"any": 1}')
    (tmp_path / "half" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "half" / "generation_config.json").write_text('{"eos_token_id": [2, 11], "x": 1}')
    return tmp_path / "half"


@pytest.mark.parametrize("case", [*CASES, "dt_limit"])
def test_export_after_import_is_the_identity(case, tmp_path):
    nj.save_pretrained(model(case), tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(GOLDEN / case / "checkpoint"))
    again = nj.load_pretrained(tmp_path / "out")
    assert again.config == model(case).config


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_sharded_bfloat16_checkpoint_comes_back_as_it_was(half_checkpoint, dtype, tmp_path):
    loaded = nj.load_pretrained(half_checkpoint, dtype=dtype)
    nj.save_pretrained(loaded, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(half_checkpoint))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    kinds = {name: leaf.dtype for name, leaf in flatten(loaded).items()}
    assert kinds["mamba.mixer.x.weight"] == (dtype or "bfloat16")
    kept = ("A_log", "mixer.D", "dt_bias", "norm.weight", "router.weight", "selection_bias")
    assert all(kinds[name] == jnp.float32 for name in kinds if name.endswith(kept))


def test_what_a_checkpoint_brings_along_is_kept(half_checkpoint, tmp_path):
    loaded = nj.load_pretrained(half_checkpoint)
    assert default_stop_tokens(loaded) == (2, 11)
    nj.save_pretrained(loaded, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (half_checkpoint / name).read_bytes()


def test_another_dtype_on_request_holds_for_every_tensor_but_the_bias(half_checkpoint, tmp_path):
    nj.save_pretrained(nj.load_pretrained(half_checkpoint), tmp_path / "out", dtype="float32")
    assert {a.dtype for a in tensors_of(tmp_path / "out").values()} == {np.dtype("float32")}
    nj.save_pretrained(model("dense"), tmp_path / "half-dense", dtype="bfloat16")
    assert {a.dtype for a in tensors_of(tmp_path / "half-dense").values()} == {HALF}


def test_a_new_model_is_written_as_bfloat16_and_read_back(tmp_path):
    new = tiny_model("ME*-M", mtp="*E")
    nj.save_pretrained(new, tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    assert all(array.dtype == HALF for name, array in stored.items() if not name.endswith(BIAS))
    again = nj.load_pretrained(tmp_path / "out")
    assert again.config == new.config and default_stop_tokens(again) == (2,)
    for name, leaf in flatten(again).items():
        exact = np.asarray(flatten(new)[name])
        rounded = exact.astype(HALF).astype(np.float32)
        kept = exact if name.endswith("selection_bias") else rounded
        np.testing.assert_array_equal(leaf, kept, err_msg=name)


def test_small_shards_hold_the_same_model(tmp_path):
    whole = model("hybrid_moe_latent")
    save_hub(whole, tmp_path / "out", shard_bytes=100_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 5 and {file.name for file in files} == set(index["weight_map"].values())
    assert all(f"-of-{len(files):05d}" in file.name for file in files)
    stored = tensors_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())
    assert all(file.stat().st_size < 120_000 for file in files)
    assert_same_tensors(stored, tensors_of(LATENT))
    again = nj.load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, flatten(again), flatten(whole))


def test_gradients_are_written_under_the_hubs_names(tmp_path):
    whole = model("dense")
    gradient = quick_jit(jax.grad(lambda m: jnp.sum(m.embedding[...] ** 2) / 2))(whole)
    nj.save_pretrained(gradient, tmp_path / "out")
    stored, original = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / "dense" / "checkpoint")
    assert stored.keys() == original.keys()
    name = "backbone.embeddings.weight"
    np.testing.assert_array_equal(stored.pop(name), original[name])
    assert not any(array.any() for array in stored.values())


def test_all_tensors_that_do_not_fit_are_one_error(tmp_path):
    tensors = tensors_of(LATENT)
    del tensors["backbone.norm_f.weight"], tensors["mtp.layers.0.eh_proj.weight"]
    tensors["backbone.layers.9.norm.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = np.zeros((5, 64), np.float32)
    write_checkpoint(tmp_path / "bad", tensors, shards=2)
    with pytest.raises(ValueError, match="4 tensors do not fit") as error:
        nj.load_pretrained(tmp_path / "bad")
    for part in (
        "missing backbone.norm_f.weight (64,)",
        "missing mtp.layers.0.eh_proj.weight (64, 128)",
        "unknown backbone.layers.9.norm.weight (3,)",
        "misshapen lm_head.weight: (5, 64), expected (192, 64)",
    ):
        assert part in str(error.value)


def test_a_checkpoint_without_mtp_says_how_to_load_it(tmp_path):
    tensors = {n: a for n, a in tensors_of(LATENT).items() if not n.startswith("mtp.")}
    write_checkpoint(tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match="num_nextn_predict_layers to 0"):
        nj.load_pretrained(tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    assert nj.load_pretrained(tmp_path / "bad").mtp_block is None


def _truncate(directory):
    file = directory / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return file.name


def _garble_header(directory):
    file = directory / "model-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[8:20] = b"\xff" * 12
    file.write_bytes(data)
    return file.name


def _claim_a_long_header(directory):
    file = directory / "model-00001-of-00003.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])
    return file.name


def _empty(directory):
    (directory / "model-00003-of-00003.safetensors").write_bytes(b"")
    return "model-00003-of-00003.safetensors"


def _lose(directory):
    (directory / "model-00003-of-00003.safetensors").unlink()
    return "model-00003-of-00003.safetensors"


def _break_index(directory):
    file = directory / "model.safetensors.index.json"
    file.write_text(file.read_text()[:-40])
    return file.name


def _empty_index(directory):
    (directory / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json"


def _drop_config(directory):
    (directory / "config.json").unlink()
    return "config.json"


DAMAGES = [
    _truncate,
    _garble_header,
    _claim_a_long_header,
    _empty,
    _lose,
    _break_index,
    _empty_index,
    _drop_config,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_file_is_named(damage, half_checkpoint):
    with pytest.raises(ValueError, match=damage(half_checkpoint)):
        nj.load_pretrained(half_checkpoint)


def test_saving_over_a_directory_keeps_its_other_files(half_checkpoint):
    (half_checkpoint / "README.md").write_text("mine")
    (half_checkpoint / "notes").mkdir()
    (half_checkpoint / "notes" / "a.txt").write_text("mine too")
    loaded = nj.load_pretrained(half_checkpoint)
    before = tensors_of(half_checkpoint)
    nj.save_pretrained(loaded, half_checkpoint)
    assert_same_tensors(tensors_of(half_checkpoint), before)
    assert (half_checkpoint / "README.md").read_text() == "mine"
    assert (half_checkpoint / "notes" / "a.txt").read_text() == "mine too"
    assert (half_checkpoint / "tokenizer.json").read_text() == '{"any": 1}'
    assert not list(half_checkpoint.glob("model-*")), "old shards are gone, and so is their index"
    assert not (half_checkpoint / "model.safetensors.index.json").exists()
    assert os.listdir(half_checkpoint.parent) == ["half"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_save_that_fails_leaves_the_old_model_whole(failing, half_checkpoint, monkeypatch):
    loaded = nj.load_pretrained(half_checkpoint)
    changed = jax.tree.map(lambda a: np.asarray(a) + 1, loaded)
    before = {f.name: f.read_bytes() for f in half_checkpoint.iterdir()}
    calls = []

    def fail_at(original):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == failing:
                raise OSError("disk full")
            return original(*arguments)

        return call

    monkeypatch.setattr(os, "replace", fail_at(os.replace))
    monkeypatch.setattr(os, "rename", fail_at(os.rename))
    with pytest.raises(OSError, match="disk full"):
        nj.save_pretrained(changed, half_checkpoint)
    assert {f.name: f.read_bytes() for f in half_checkpoint.iterdir()} == before
    assert os.listdir(half_checkpoint.parent) == ["half"]


LOAD_AND_MEASURE = """
import resource, sys
import jax, numpy as np
import nemotron_jax as nj
from nemotron_jax.model.parameters import flatten
nj.load_pretrained(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = nj.load_pretrained(sys.argv[1])
print(peak() - before, sum(leaf.nbytes for leaf in flatten(model).values()))
"""


def test_loading_needs_no_more_memory_than_the_model_and_a_shard(tmp_path):
    config = json.loads((LATENT / "config.json").read_text())
    config |= {"vocab_size": 32_768, "moe_intermediate_size": 8192, "dtype": "bfloat16"}
    shapes = {name: array.shape for name, array in tensors_of(LATENT).items()}
    resize = {192: 32_768, 24: 8192}
    tensors = {
        name: np.zeros(
            [resize.get(n, n) for n in shape]
            if ".experts." in name or name in ("lm_head.weight", "backbone.embeddings.weight")
            else shape,
            np.float32 if name.endswith(BIAS) else HALF,
        )
        for name, shape in shapes.items()
    }
    write_checkpoint(tmp_path / "large", tensors, shards=8, dtype="bfloat16")
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    shard = max(file.stat().st_size for file in tmp_path.glob("large/*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, tmp_path / "large", LATENT],
        capture_output=True,
        text=True,
        check=True,
    )
    used, destination = map(int, done.stdout.split())
    assert destination > 80_000_000
    assert used < destination + 2 * shard + 5_000_000  # a float32 copy of a shard's tensor
    shutil.rmtree(tmp_path / "large")
