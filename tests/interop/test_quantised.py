"""Directories of codes with scales load as the floats that they stand for, or say what is wrong."""

import hashlib
import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.interop.hf_names import hub_tensors
from nemotron_jax.interop.hf_quantised import Codes, Stored
from nemotron_jax.interop.hf_recipe import NVFP4, read_recipe
from nemotron_jax.interop.hub_files import INDEX_FILE
from nemotron_jax.interop.safetensors_file import STORED_DTYPES, SafetensorsFile
from nemotron_jax.model.parameters import flatten
from nemotron_jax.sharding import make_mesh
from tests.golden_cases import GOLDEN

SUPER = GOLDEN.parent / "quantised" / "super_nvfp4"
DIGESTS = json.loads((SUPER.parent / "super_nvfp4_float32_sha256.json").read_text())
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj"
FP8 = "backbone.layers.0.mixer.in_proj"
E4M3 = ml_dtypes.float8_e4m3fn


def write(path, tensors) -> None:
    """A safetensors file; the library's own writer knows no 8-bit floats."""
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    header, start = {}, 0
    for name, array in tensors.items():
        ends = [start, start := start + array.nbytes]
        shape = list(array.shape)
        header[name] = {"dtype": names[array.dtype], "shape": shape, "data_offsets": ends}
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(directory) -> dict[str, np.ndarray]:
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: file.read(name) for name in file.entries}


@pytest.fixture
def hub(tmp_path):
    return shutil.copytree(SUPER, tmp_path / "hub")


def table(model) -> dict[str, np.ndarray]:
    """The model's values under the hub's names."""
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(model).items()}
    tensors = hub_tensors(model.config, set(arrays))
    return {tensor.name: np.ascontiguousarray(tensor.to_hub(arrays)) for tensor in tensors}


def digests(model) -> dict[str, str]:
    return {n: hashlib.sha256(a.tobytes()).hexdigest()[:32] for n, a in table(model).items()}


def edit_recipe(directory, **values) -> None:
    """Change config.json's recipe and leave it the only one; None takes a key away."""
    (directory / "hf_quant_config.json").unlink(missing_ok=True)
    keys = json.loads((directory / "config.json").read_text())
    recipe = keys["quantization_config"] | values
    keys["quantization_config"] = {k: v for k, v in recipe.items() if v is not None}
    (directory / "config.json").write_text(json.dumps(keys))


def test_values_are_the_reference_s_bit_for_bit() -> None:
    assert digests(nj.load_pretrained(SUPER)) == DIGESTS


def test_parts_of_a_matrix_may_lie_in_different_files(hub) -> None:
    tensors = read(hub)
    (hub / "model.safetensors").unlink()
    place = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(tensors)}
    for file in set(place.values()):
        write(hub / file, {n: a for n, a in tensors.items() if place[n] == file})
    (hub / INDEX_FILE).write_text(json.dumps({"weight_map": place}))
    assert digests(nj.load_pretrained(hub)) == DIGESTS


@pytest.mark.parametrize("algorithm", ["NVFP4", "MIXED_PRECISION", "FP8"])
def test_without_a_list_the_files_decide(hub, algorithm) -> None:
    edit_recipe(hub, quantized_layers=None, quant_algo=algorithm)
    assert digests(nj.load_pretrained(hub)) == DIGESTS


def test_a_list_may_hold_patterns(hub) -> None:
    layers = json.loads((hub / "config.json").read_text())["quantization_config"]
    layers = {n: how for n, how in layers["quantized_layers"].items() if ".experts." not in n}
    every = {"backbone.layers.*.mixer.experts.*": {"quant_algo": "W4A16_NVFP4"}}
    edit_recipe(hub, quantized_layers=layers | every, ignore=["mtp*", "lm_head"])
    assert digests(nj.load_pretrained(hub)) == DIGESTS


def test_scales_of_activations_and_of_the_cache_are_not_needed(hub) -> None:
    needless = ("input_scale", "k_scale", "v_scale")
    tensors = {n: a for n, a in read(hub).items() if not n.endswith(needless)}
    write(hub / "model.safetensors", tensors)
    assert digests(nj.load_pretrained(hub)) == DIGESTS


def test_fp8_has_a_scale_for_the_matrix_or_for_each_row(hub) -> None:
    tensors, rng = read(hub), np.random.default_rng(0)
    codes = tensors[f"{FP8}.weight"].astype(np.float32)
    for shape in ((1,), (len(codes),), (len(codes), 1)):
        scale = rng.uniform(0.01, 1, shape).astype(np.float32)
        write(hub / "model.safetensors", tensors | {f"{FP8}.weight_scale": scale})
        found = table(nj.load_pretrained(hub))[f"{FP8}.weight"]
        np.testing.assert_array_equal(found, codes * scale.reshape(-1, 1))


def test_compressed_tensors_divides_by_the_global_scale(hub) -> None:
    expected, tensors = table(nj.load_pretrained(SUPER)), {}
    for name, array in read(hub).items():
        if name.endswith("weight_scale_2"):
            tensors[name.replace("scale_2", "global_scale")] = np.float32([1]) / array
        elif array.dtype == np.uint8:
            tensors[f"{name}_packed"] = array
        else:
            tensors[name] = array
    write(hub / "model.safetensors", tensors)
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    edit_recipe(
        hub,
        quant_method="compressed-tensors",
        format="nvfp4-pack-quantized",
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head", "re:.*gate"],
        quantized_layers=None,
        quant_algo=None,
    )
    found = table(nj.load_pretrained(hub))
    for name, values in expected.items():
        # Two divisions where the reference multiplies: half a unit in the last place each.
        np.testing.assert_allclose(found[name], values, rtol=3e-7, err_msg=name)


def test_each_value_is_rounded_once() -> None:
    expected, found = table(nj.load_pretrained(SUPER)), nj.load_pretrained(SUPER, "bfloat16")
    for name in (EXPERT, FP8):
        rounded = expected[f"{name}.weight"].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(table(found)[f"{name}.weight"], rounded)


def test_on_a_mesh_the_values_are_the_same() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    assert digests(nj.load_pretrained(SUPER, mesh=mesh)) == DIGESTS


def test_what_is_saved_is_a_model_of_floats(hub) -> None:
    model = nj.load_pretrained(hub)
    nj.save_pretrained(model, hub, dtype="float32")
    assert not (hub / "hf_quant_config.json").exists()
    assert digests(nj.load_pretrained(hub)) == DIGESTS


def test_every_byte_is_two_codes_of_e2m1(tmp_path) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scale = np.full((2, 16), 2, E4M3)
    parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": np.float32([0.5])}
    write(tmp_path / "m.safetensors", parts)
    file = SafetensorsFile(tmp_path / "m.safetensors")
    stored = [Stored(name, file, file.entries[name]) for name in parts]
    found = Codes(NVFP4, (2, 256), *stored).read(np.dtype(np.float32))

    def value(code: int) -> float:
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        return -size if code & 8 else size

    expected = [[value(code & 15), value(code >> 4)] for code in range(256)]
    np.testing.assert_array_equal(found.reshape(-1), np.float32(expected).reshape(-1))


def without(name):
    return lambda tensors: {n: a for n, a in tensors.items() if n != name}


def having(name, change):
    return lambda tensors: tensors | {name: np.asarray(change(tensors.get(name)))}


def spoiled(array, value):
    array = array.copy()
    array.reshape(-1)[-1:] = value
    return array


SCALE, FACTOR = f"{EXPERT}.weight_scale", f"{EXPERT}.weight_scale_2"
WRONG = {
    "no block scales": (without(SCALE), f"{EXPERT}.weight' .*'{SCALE}' is in no file"),
    "no factor": (without(FACTOR), f"{EXPERT}.weight' .*'{FACTOR}' is in no file"),
    "no scale": (without(f"{FP8}.weight_scale"), f"{FP8}.weight_scale' is in no file"),
    "no codes": (without(f"{EXPERT}.weight"), "unknown scale.*weight', which is in no file"),
    "rows cut": (having(SCALE, lambda a: a[:-1]), f"{SCALE}' has shape .47, 2.*expected .48, 2"),
    "codes cut": (having(f"{EXPERT}.weight", lambda a: a[:, :-1]), "expected .48, 16. and uint8"),
    "factors": (having(FACTOR, lambda a: np.float32([a, a])), f"{FACTOR}' has shape .2"),
    "scale dtype": (having(SCALE, lambda a: a.astype(np.float32)), "expected .* float8_e4m3fn"),
    "swizzled": (having(SCALE, lambda a: a.reshape(-1)), f"{SCALE}' has shape .96"),
    "blocks of fp8": (having(f"{FP8}.weight_scale", lambda a: np.ones((3, 1))), "has shape .3, 1"),
    "nan scale": (having(SCALE, lambda a: spoiled(a, np.nan)), f"{SCALE}' holds NaN"),
    "negative scale": (having(SCALE, lambda a: spoiled(a, -1)), f"{SCALE}' holds NaN or a neg"),
    "nan factor": (having(FACTOR, lambda a: np.float32(np.nan)), f"{FACTOR}' is nan"),
    "negative factor": (having(FACTOR, lambda a: np.float32(-1)), f"{FACTOR}' is -1"),
    "overflow": (having(FACTOR, lambda a: np.float32(3e38)), f"{EXPERT}.weight' holds NaN or inf"),
    "nan code": (having(f"{FP8}.weight", lambda a: spoiled(a, np.nan)), f"{FP8}.weight' holds NaN"),
    "inf": (having(f"{FP8}.weight_scale", lambda a: np.float32(np.inf)), "weight_scale' holds NaN"),
    "other scale": (having(f"{EXPERT}.pre_quant_scale", lambda _: np.ones(32)), "unknown scale"),
    "scaled floats": (
        having("backbone.layers.5.mixer.q_proj.weight_scale", lambda _: np.float32(1)),
        "unknown scale: it belongs to no format, beside .*bfloat16",
    ),
    "stray": (having("backbone.layers.99.up_proj.weight_scale", lambda _: np.float32(1)), "no mat"),
    "input scale": (having(f"{FP8}.input_scale", lambda _: np.ones(3)), "input_scale' has shape"),
    "codes of a norm": (
        having("backbone.layers.0.norm.weight", lambda a: a.astype(E4M3)),
        "does not list it as quantised|no matrix",
    ),
    "floats": (
        having(f"{EXPERT}.weight", lambda a: np.ones((48, 32), np.float32)),
        f"{EXPERT}.weight' is stored as float32, and config.json lists the module as NVFP4",
    ),
    "unlisted": (
        having("lm_head.weight", lambda a: a.astype(E4M3)),
        "'lm_head.weight' is stored as float8_e4m3fn, and config.json does not list it",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_with_file_tensor_and_rule(hub, case) -> None:
    change, sentence = WRONG[case]
    write(hub / "model.safetensors", change(read(hub)))
    with pytest.raises(ValueError, match=sentence) as error:
        nj.load_pretrained(hub)
    assert "model.safetensors: tensor '" in str(error.value)
    assert "\n" not in str(error.value)


RECIPES = {
    "algorithm": ({"quant_algo": "INT4_AWQ"}, "quant_algo='INT4_AWQ' is not read here"),
    "no text": ({"quant_algo": ["NVFP4"]}, "quant_algo=.*NVFP4.* is not read here"),
    "of a layer": ({"quantized_layers": {FP8: {"quant_algo": "W8A8"}}}, "quant_algo='W8A8'"),
    "layers": ({"quantized_layers": [FP8]}, "quantized_layers=.* must be an object"),
    "no layer": ({"quantized_layers": {FP8: 3}}, "quantized_layers.*must be an object"),
    "blocks": (
        {"quantized_layers": {FP8: {"quant_algo": "NVFP4", "group_size": 32}}},
        "group_size=32",
    ),
    "other model": (
        {"quantized_layers": {"backbone.layers.77.mixer.in_proj": {"quant_algo": "FP8"}}},
        "lists the module 'backbone.layers.77.mixer.in_proj', which the model",
    ),
    "method": ({"quant_method": "awq", "quant_algo": None}, "quant_method='awq'"),
    "nothing": (
        {"quant_algo": None, "quantized_layers": None},
        "has no quant_algo, and its files store 80 matrices",
    ),
    "format": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "format='pack-quantized' is not read here",
    ),
    "rotated": (
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "transform_config": {"config_groups": {"R1": {}}},
        },
        "transform_config rotates",
    ),
    "integers": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}},
        "num_bits=8, type='int'",
    ),
    "ignored": ({"ignore": "lm_head"}, "ignore='lm_head' must be a list"),
    "names": ({"ignore": [None]}, "ignore names None"),
    "patterns": ({"ignore": [f"*{n}" for n in range(2000)]}, "2000 patterns of modules; at most"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_is_not_read_is_named_with_its_key(hub, case) -> None:
    values, sentence = RECIPES[case]
    edit_recipe(hub, **values)
    with pytest.raises(ValueError, match=sentence) as error:
        nj.load_pretrained(hub)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_two_recipes_that_list_different_modules_are_refused(hub) -> None:
    file = hub / "hf_quant_config.json"
    recipe = json.loads(file.read_text())
    del recipe["quantization"]["quantized_layers"][FP8]
    file.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=f"list different modules .'{FP8}' is one"):
        nj.load_pretrained(hub)


def test_names_in_a_recipe_are_the_text_model_s(tmp_path) -> None:
    layers = {"language_model.backbone.layers.1.mixer.in_proj": {"quant_algo": "FP8"}}
    recipe = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": recipe}))
    found = read_recipe(tmp_path, {})
    assert found.expected("backbone.layers.1.mixer.in_proj") == "FP8"
    assert found.expected("backbone.layers.1.mixer.out_proj") == ""
