"""Files that are broken, hostile or huge end in one line of ValueError that names the file."""

import json
import random
import shutil
import struct
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nemotron_jax as nj
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.untrusted import MOST_NESTED, parse_json, read_object
from nemotron_jax.data.companions import stop_tokens
from nemotron_jax.interop.hub_files import INDEX_FILE, open_hub
from nemotron_jax.interop.peft_config import CONFIG_FILE, read_adapter_config
from nemotron_jax.interop.safetensors_file import SafetensorsFile, is_finite
from tests.golden_cases import GOLDEN

NAME = "model.safetensors"
ADAPTER = json.dumps(
    {"peft_type": "LORA", "r": 3, "lora_alpha": 5.0, "target_modules": ["q_proj", "in_proj"],
     "use_rslora": True, "layers_to_transform": [2], "exclude_modules": None, "lora_dropout": 0.1,
     "rank_pattern": {}, "init_lora_weights": True, "base_model_name_or_path": "some/model"}
).encode()  # fmt: skip
DEEP = b'{"a":' * 100_000


@pytest.fixture
def hub(tmp_path):
    return shutil.copytree(GOLDEN / "dense" / "checkpoint", tmp_path / "hub")


def refuses(read, *words: str) -> None:
    """One line, short, with the words."""
    with pytest.raises(ValueError) as caught:
        read()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 2000, text
    for word in words:
        assert word in text, (word, text)


def header_of(file) -> dict:
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def with_header(file, header) -> None:
    raw = file.read_bytes()
    body = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**12, 10**12]},
        {"shape": [2**32, 2**32]},
        {"shape": [-3, -24]},
        {"shape": "1e999"},
        {"shape": [float("nan")]},
        {"shape": [True, 2]},
        {"shape": "ab"},
        {"shape": {"a": 1}},
        {"shape": 3},
        {"shape": [1] * 100_000},
        {"shape": [10**4000] * 100},
        {"dtype": ["F32"]},
        {"dtype": None},
        {"dtype": "F4" * 10_000},
        {"dtype": "I64"},
        {"data_offsets": [-100, 0]},
        {"data_offsets": [10**30, 10**30 + 4]},
        {"data_offsets": [0.5, 4.5]},
        {"data_offsets": [0, 1, 2]},
        {"data_offsets": "01"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_header_that_says_impossible_things_names_its_file(hub, changes) -> None:
    file = hub / NAME
    header = header_of(file)
    header["backbone.embeddings.weight"] |= changes
    with_header(file, json.dumps(header).replace('"1e999"', "[1e999]").encode())
    refuses(lambda: SafetensorsFile(file), str(file))


@pytest.mark.parametrize("header", [DEEP, b"[" * 100_000, b"[]", b"7", b"null", b"\xff", b""])
def test_a_header_that_is_no_table_names_its_file(hub, header) -> None:
    with_header(hub / NAME, header)
    refuses(lambda: SafetensorsFile(hub / NAME), str(hub / NAME))


def test_two_tensors_never_share_bytes(hub) -> None:
    header = header_of(hub / NAME)
    first, second = [n for n in header if n != "__metadata__"][:2]
    header[second] = header[first]
    with_header(hub / NAME, header)
    refuses(lambda: SafetensorsFile(hub / NAME), "share bytes", first, second)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_FILE])
@pytest.mark.parametrize(
    "text", [DEEP, b"[" * 100_000, b"\xff", b"", b"7", b'{"a": 1' + b"0" * 9999]
)
def test_json_that_is_none_names_its_file(hub, name, text) -> None:
    (hub / name).write_bytes(text)
    refuses(lambda: nj.load_pretrained(hub), str(hub / name))


def test_pipes_and_endless_files_are_never_read(hub) -> None:
    for name in ("config.json", NAME):
        (hub / name).unlink()
        (hub / name).symlink_to("/dev/zero")
        read = SafetensorsFile if name == NAME else ModelConfig.from_hf
        refuses(lambda read=read, name=name: read(hub / name), str(hub / name))


def test_nesting_is_allowed_to_a_depth_that_every_reader_bears() -> None:
    nested = lambda depth: b"[" * depth + b"]" * depth
    assert parse_json(nested(MOST_NESTED))
    for depth in (MOST_NESTED + 2, 900):
        refuses(lambda depth=depth: parse_json(nested(depth)), "nested deeper")


@pytest.mark.parametrize(
    "name",
    ["../outside/model.safetensors", "{abs}", "/etc/passwd", "a/../../x.safetensors", "a\0b", ".",
     "..\\x.safetensors", "C:\\x.safetensors", "pytorch_model.bin", 7, None, ["a"], ""],
    ids=str,
)  # fmt: skip
def test_an_index_never_leads_out_of_its_directory(hub, name, tmp_path, monkeypatch) -> None:
    shutil.copytree(hub, tmp_path / "outside")
    name = str(tmp_path / "outside" / NAME) if name == "{abs}" else name
    weight_map = dict.fromkeys(load_file(hub / NAME), name)
    (hub / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr("nemotron_jax.interop.hub_files.SafetensorsFile", lambda file: 1 / 0)
    keys = json.loads((hub / "config.json").read_text())
    refuses(lambda: open_hub(hub, keys), str(hub / INDEX_FILE), "only .safetensors files within")


def test_shards_in_a_subfolder_are_read(hub) -> None:
    expected = nj.load_pretrained(hub)
    (hub / "below").mkdir()
    tensors = load_file(hub / NAME)
    (hub / NAME).rename(hub / "below" / NAME)
    (hub / INDEX_FILE).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, f"below/{NAME}")})
    )
    found = nj.load_pretrained(hub)
    np.testing.assert_array_equal(found.embedding[...], expected.embedding[...])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_one_wrong_number_in_a_tensor_is_found(value, dtype) -> None:
    array = np.random.default_rng(0).normal(size=3_000_001).astype(dtype)
    array[:2] = np.finfo(np.float16).max, -0.0
    assert is_finite(array)
    array[-1] = value
    assert not is_finite(array)


def test_weights_that_are_no_numbers_name_their_tensor(hub) -> None:
    tensors = load_file(hub / NAME)
    name = "backbone.layers.0.mixer.A_log"
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, hub / NAME)
    refuses(lambda: nj.load_pretrained(hub), str(hub / NAME), name, "holds NaN or infinity")


@pytest.mark.parametrize("eos", [-5, 10**30, [2, -1], [2, 10**9], True, 2.0, {"a": 1}])
def test_end_tokens_are_ids_of_the_vocabulary(hub, eos) -> None:
    (hub / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    refuses(lambda: stop_tokens(hub, 64), "generation_config.json", "eos_token_id")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 10**8, "hybrid_override_pattern": "ME*-", "n_group": 1},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
        {"hybrid_override_pattern": "M" * 10_001},
        {"hidden_size": 10**400},
        {"layer_norm_epsilon": 1e999},
        {"layer_norm_epsilon": 10**400},
        {"time_step_limit": [0, 10**400]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_config_of_another_size_than_the_files_takes_no_memory(hub, changes) -> None:
    config = json.loads((hub / "config.json").read_text())
    config.pop("layers_block_type", None)
    (hub / "config.json").write_text(json.dumps(config | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses(lambda: nj.load_pretrained(hub), str(hub))


def mutated(draw: random.Random, text: bytes) -> bytes:
    """The text with bytes flipped, cut, doubled, or a value replaced by a hostile one."""
    text = bytearray(text)
    kind = draw.randrange(4)
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            text[draw.randrange(len(text))] = draw.randrange(256)
    elif kind == 1:
        del text[draw.randrange(len(text)) :]
    elif kind == 2:
        start = draw.randrange(len(text))
        text[start:start] = text[start : start + draw.randrange(40)]
    else:
        values = (
            b"1e999",
            b"-1",
            b"null",
            b"[[]]",
            b'"\\ud800"',
            b"NaN",
            b"1" * 40,
            b"9" * 400,
            b"{}",
        )
        start = draw.randrange(len(text))
        text[start : start + draw.randrange(1, 6)] = draw.choice(values)
    return bytes(text)


def test_no_damage_to_a_small_file_raises_anything_else(hub) -> None:
    """200 damaged headers, configs and indices: read, or refused in one line."""
    draw = random.Random(0)
    index = {"weight_map": dict.fromkeys(load_file(hub / NAME), NAME)}
    (hub / INDEX_FILE).write_text(json.dumps(index))
    keys = json.loads((hub / "config.json").read_text())
    raw = (hub / NAME).read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    files = {
        NAME: (raw[:end], raw[end:], lambda: open_hub(hub, keys)),
        "config.json": ((hub / "config.json").read_bytes(), b"", lambda: ModelConfig.from_hf(hub)),
        INDEX_FILE: ((hub / INDEX_FILE).read_bytes(), b"", lambda: open_hub(hub, keys)),
        CONFIG_FILE: (ADAPTER, b"", lambda: read_adapter_config(hub / CONFIG_FILE)),
        "generation_config.json": (b'{"eos_token_id": [2, 11]}', b"", lambda: stops(hub)),
    }
    refused = 0
    for name, (head, rest, read) in files.items():
        for _ in range(40):
            (hub / name).write_bytes(mutated(draw, head) + rest)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read()
            except ValueError as error:
                text = str(error)
                assert len(text.splitlines()) == 1 and str(hub) in text and len(text) < 2000, text
                refused += 1
        (hub / name).write_bytes(head + rest)
    assert refused > 100


def stops(hub):
    return stop_tokens(hub, 64)


def test_a_read_object_says_what_to_do(tmp_path) -> None:
    refuses(lambda: read_object(tmp_path / "none.json", "do this"), "none.json is missing; do this")
