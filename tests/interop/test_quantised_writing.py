"""Models saved as codes give the same values back, stored as their recipe says."""

import collections
import json
import re

import ml_dtypes
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.interop.hf_encode import Quantization
from nemotron_jax.interop.hf_names import hub_tensors
from nemotron_jax.interop.hf_presets import stored_formats
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model.parameters import abstract_model, flatten
from nemotron_jax.quant.calibrate import METHODS, fp8_codes, nvfp4_codes
from tests.golden_cases import GOLDEN
from tests.interop.test_quantised import DIGESTS, SUPER, digests, table

CONFIGS = GOLDEN.parent / "hub_configs"
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def model() -> nj.Nemotron:
    return nj.load_pretrained(SUPER)


def stored(directory) -> dict[str, np.ndarray]:
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: file.read(name) for name in file.entries}


def formats(recipe: str, name: str) -> dict[str, str]:
    keys = json.loads((CONFIGS / f"NVIDIA-Nemotron-3{name}_config.json").read_text())
    config = nj.ModelConfig.from_hf(keys)
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_model(config)).items()}
    return stored_formats(recipe, config, list(hub_tensors(config, set(shapes))), shapes)


def test_floats_of_codes_are_stored_as_the_same_floats(model, tmp_path) -> None:
    counts = nj.save_pretrained(model, tmp_path / "out", quantization="released")
    assert counts == {"NVFP4": 64, "FP8": 16}
    assert digests(nj.load_pretrained(tmp_path / "out")) == DIGESTS


def test_experts_that_are_codes_stay_these_codes(tmp_path) -> None:
    held = nj.load_pretrained(SUPER, experts="nvfp4")
    nj.save_pretrained(held, tmp_path / "out", quantization="nvfp4")
    before, after = stored(SUPER), stored(tmp_path / "out")
    for name in before:
        if ".experts." in name and not name.endswith("input_scale"):
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    with pytest.raises(ValueError, match="quantization='fp8': the model holds .* as NVFP4 codes"):
        nj.save_pretrained(held, tmp_path / "other", quantization="fp8")
    assert not (tmp_path / "other").exists()


def test_a_matrix_has_the_published_tensors(model, tmp_path) -> None:
    how = Quantization("released", inputs={"backbone.layers.1.mixer.experts.0.up_proj": 2688.0})
    nj.save_pretrained(model, tmp_path / "out", quantization=how)
    tensors, name = stored(tmp_path / "out"), "backbone.layers.1.mixer.experts.0.up_proj"
    parts = {n.removeprefix(name): a for n, a in tensors.items() if n.startswith(name)}
    found = {part: (a.dtype.name, a.shape) for part, a in parts.items()}
    assert found == {
        ".weight": ("uint8", (48, 16)),
        ".weight_scale": ("float8_e4m3fn", (48, 2)),
        ".weight_scale_2": ("float32", ()),
        ".input_scale": ("float32", ()),
    }
    assert parts[".input_scale"] == 1
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    own = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert keys["quant_method"] == "modelopt" and keys["quantized_layers"][name] == {
        "quant_algo": "NVFP4",
        "group_size": 16,
    }
    assert own["quantized_layers"] == keys["quantized_layers"]
    assert "mtp*" in own["exclude_modules"] and "lm_head" in own["exclude_modules"]


def test_one_format_is_named_for_the_whole(model, tmp_path) -> None:
    nj.save_pretrained(model, tmp_path / "out", quantization="fp8")
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert keys["quant_algo"] == "FP8" and "quantized_layers" not in keys
    found = table(nj.load_pretrained(tmp_path / "out"))
    name = "backbone.layers.3.mixer.experts.2.down_proj.weight"
    # Three bits of mantissa: half a unit of them is a sixteenth.
    np.testing.assert_allclose(found[name], table(model)[name], rtol=1 / 16)


def test_the_released_lists_are_the_published_ones() -> None:
    listed = json.loads(next(CONFIGS.glob("*quantized_modules.json")).read_text())
    found = formats("released", "-Super-120B-A12B-NVFP4")
    assert collections.Counter(found.values()) == {
        kind: listed["counts"][kind] for kind in ("NVFP4", "FP8")
    }
    fp8 = collections.defaultdict(list)
    for module, kind in found.items():
        layer, place = re.fullmatch(r"backbone\.layers\.(\d+)\.mixer\.(.+)", module).groups()
        if kind == "FP8":
            fp8[place].append(int(layer))
    assert fp8 == listed["fp8_layers_by_module"]
    lightning = collections.Counter(formats("released", ".5-Lightning-30B-A3B-NVFP4").values())
    assert lightning == {"NVFP4": 5888 + 46 + 1, "FP8": 46}
    assert len(formats("released", "-Nano-30B-A3B-NVFP4")) == 17 * 2 + 23 * 258


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_the_nearest_numbers_and_better_methods_err_less(method) -> None:
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((24, 64)).astype(np.float32)
    matrix[5] = 0
    value = {}
    for one in ("max", method):
        codes, scales, factor = map(np.asarray, nvfp4_codes(matrix, one))
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(24, 64)
        step = np.repeat(scales.astype(np.float32) * factor, 16, axis=1)
        value[one] = E2M1[halves] * step
        distance = np.abs(matrix[..., None] - E2M1 * step[..., None]).min(-1)
        np.testing.assert_allclose(np.abs(value[one] - matrix), distance, rtol=0, atol=1e-6)
    errors = {n: np.square(v - matrix).reshape(24, 4, 16).sum(-1) for n, v in value.items()}
    if method != "max":
        assert errors[method].sum() < 0.97 * errors["max"].sum()
    if method == "mse":  # its factor is the same, so no block may be worse
        assert (errors["mse"] <= errors["max"] * (1 + 1e-6)).all()


def test_fp8_has_one_scale_and_keeps_zeros() -> None:
    codes, scale = fp8_codes(np.float32([[0, 448, -3], [7, 0.25, 2]]))
    assert scale == 1 and codes.dtype == ml_dtypes.float8_e4m3fn
    codes, scale = fp8_codes(np.zeros((2, 3), np.float32))
    assert scale == 1 and not np.asarray(codes, np.float32).any()


def test_what_cannot_be_stored_is_refused_by_name(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="quantization='fp4': must be one of released, nvfp4, fp8"):
        nj.save_pretrained(model, tmp_path / "out", quantization="fp4")
    with pytest.raises(ValueError, match="quantize.method='best': must be one of max, mse"):
        Quantization("nvfp4", "best")
    narrow = abstract_model(nj.ModelConfig.from_hf(GOLDEN / "dense" / "checkpoint"))
    shapes = {name: (3, 3) for name in flatten(narrow)}
    tensors = [t for t in hub_tensors(narrow.config, set(shapes)) if "q_proj" in t.name]
    with pytest.raises(ValueError, match="has no matrix that it stores as codes"):
        stored_formats("nvfp4", narrow.config, tensors, shapes)
