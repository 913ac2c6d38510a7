"""The text model within a model of text and images loads, and is saved beside what is around it."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nemotron_jax as nj
from nemotron_jax.interop.hub_files import INDEX_FILE
from tests.golden_cases import GOLDEN

LATENT = GOLDEN / "hybrid_moe_latent" / "checkpoint"
VISION = {
    "vision_model.radio_model.blocks.0.weight": np.arange(12, dtype=np.float16).reshape(3, 4),
    "mlp1.0.weight": np.asarray([1.5, np.nan], ml_dtypes.bfloat16),  # whatever it holds
    "vision_projector.vision_final_layernorm.weight": np.ones((), np.float32),
}


def tensors_of(directory) -> dict[str, bytes]:
    files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
    return {name: array.tobytes() for file in files for name, array in file.items()}


@pytest.fixture(params=["backbone.", "model."])
def hub(tmp_path, request):
    """Two shards, the vision model in both, and a processor of images."""
    directory = shutil.copytree(LATENT, tmp_path / "hub")
    text = json.loads((LATENT / "config.json").read_text())
    outer = {"model_type": "nemotron_h_omni", "llm_config": text, "vision_config": {"a": 1}}
    (directory / "config.json").write_text(json.dumps(outer | {"torch_dtype": "float32"}))
    (directory / "preprocessor_config.json").write_text('{"size": 512}')
    (directory / "modeling.py").write_text("raise SystemExit")
    rename = lambda name: "language_model." + name.replace("backbone.", request.param)
    tensors = {rename(n): a for n, a in load_file(LATENT / "model.safetensors").items()} | VISION
    (directory / "model.safetensors").unlink()
    place = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({n: a for n, a in tensors.items() if place[n] == file}, directory / file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": place}))
    return directory


def test_the_text_model_is_the_one_that_stands_alone(hub) -> None:
    expected, found = nj.load_pretrained(LATENT), nj.load_pretrained(hub)
    assert found.config == expected.config
    np.testing.assert_array_equal(found.embedding[...], expected.embedding[...])


def test_saving_changes_nothing_around_the_text_model(hub, tmp_path) -> None:
    nj.save_pretrained(nj.load_pretrained(hub), tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(hub)
    for name in ("config.json", "preprocessor_config.json", "modeling.py"):
        was, now = ((folder / name).read_text() for folder in (hub, tmp_path / "out"))
        assert now == was or json.loads(now) == json.loads(was), name


def test_a_smaller_text_model_is_written_with_its_own_configuration(hub, tmp_path) -> None:
    model = nj.load_pretrained(hub, mtp="drop")
    nj.save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["llm_config"]["num_nextn_predict_layers"] == 0
    assert (config["vision_config"], config["torch_dtype"]) == ({"a": 1}, "bfloat16")
    assert nj.load_pretrained(tmp_path / "out").config == model.config
    found = tensors_of(tmp_path / "out")
    assert all(found[name] == array.tobytes() for name, array in VISION.items())


def test_a_part_is_not_saved_without_the_model_around_it(hub, tmp_path) -> None:
    model = nj.load_pretrained(hub)
    shutil.rmtree(hub)
    with pytest.raises(ValueError, match="config.json is missing; save_pretrained needs the model"):
        nj.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llm_config": {"hidden_size": "x"}}, r"llm_config\.hybrid_override_pattern=None"),
        ({"llm_config": [1]}, r"HubConfig.llm_config=\[1\]: must be an object"),
        ({"block_configs": [{}]}, "HubConfig.block_configs=.*must be absent"),
        ({"model_type": "nemotron_h_puzzle"}, "model_type='nemotron_h_puzzle'"),
        ({"model_type": "llava"}, "model_type='llava'"),
        ({"model_type": None}, "model_type=None"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_such_model_is_refused_by_its_field(hub, changes, words) -> None:
    file = hub / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        nj.load_pretrained(hub)


def test_sizes_of_single_blocks_are_never_ignored() -> None:
    keys = json.loads((LATENT / "config.json").read_text())
    for changes in ({"block_configs": [{"moe": 1}]}, {"model_type": "nemotron_h_puzzle"}):
        with pytest.raises(ValueError, match="HubConfig.(block_configs|model_type)"):
            nj.ModelConfig.from_hf(keys | changes)
    keys = {"model_type": "nemotron_h_omni", "llm_config": keys | {"block_configs": [1]}}
    with pytest.raises(ValueError, match="HubConfig.llm_config.block_configs"):
        nj.ModelConfig.from_hf(keys)
