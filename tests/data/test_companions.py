"""What a run keeps of the model it began with, and adds for a chat."""

import dataclasses
import json

import pytest

from nemotron_jax.data import companions
from nemotron_jax.data.chat.hub_template import template_differences
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.run_directory import RunDirectory
from tests.tiny_models import tiny_config

SIX = {
    "chat_template.jinja": "{{ messages }}",
    "tokenizer_config.json": '{"eos_token": "<|im_end|>", "x": 1}',
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"eos_token_id": [2, 11], "temperature": 0.6}',
    "tokenizer.json": "{}",
    "config.json": '{"model_type": "nemotron_h"}',
}
KEPT = set(SIX) - {"config.json", "tokenizer.json"}
TRAINED = train_tokenizer(["a few words"], 300)


MODEL = dataclasses.replace(tiny_config("*"), vocab_size=512)


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "model").mkdir()
    for name, text in SIX.items():
        (tmp_path / "model" / name).write_text(text)
    return tmp_path / "model"


def kept(folder, init_from="", *, chats: bool = True) -> dict[str, str]:
    """What a run in this folder keeps."""
    folder.mkdir()
    TRAINED.save(folder)
    companions.keep(RunDirectory(folder), MODEL, str(init_from), chats=chats)
    files = sorted((folder / "hub").glob("*"))
    return {file.name: file.read_text() for file in files}


@pytest.mark.parametrize("chats", [False, True])
def test_all_that_a_hub_directory_brings_is_kept_to_the_byte(hub, tmp_path, chats) -> None:
    assert kept(tmp_path / "run", hub, chats=chats) == {n: SIX[n] for n in KEPT}


def test_a_run_hands_on_what_it_kept(hub, tmp_path) -> None:
    first = kept(tmp_path / "one", hub)
    assert kept(tmp_path / "two", tmp_path / "one") == first
    checkpoint = tmp_path / "one" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    assert kept(tmp_path / "three", checkpoint, chats=False) == first


def test_a_chat_that_was_learned_here_has_a_template_and_ends_its_turns(tmp_path) -> None:
    files = kept(tmp_path / "run")
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 11]
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["eos_token"], settings["bos_token"]) == ("<|im_end|>", "<s>")
    assert "chat_template.jinja" in files
    assert template_differences(tmp_path / "run/hub") == []
    assert companions.stop_tokens(tmp_path / "run/hub", 512) == (2, 11)


def test_a_base_model_that_learns_to_chat_gets_what_it_lacks(hub, tmp_path) -> None:
    (hub / "chat_template.jinja").unlink()
    (hub / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.95}')
    files = kept(tmp_path / "run", hub)
    generation = json.loads(files["generation_config.json"])
    assert generation == {"eos_token_id": [2, 11], "top_p": 0.95}
    assert files["tokenizer_config.json"] == SIX["tokenizer_config.json"]
    assert "<|im_start|>" in files["chat_template.jinja"]
    (hub / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert "chat_template.jinja" not in kept(tmp_path / "other", hub)


def test_a_run_of_plain_text_has_nothing_to_keep(tmp_path) -> None:
    assert kept(tmp_path / "run", chats=False) == {}
    assert not (tmp_path / "run/hub").exists()


def test_end_tokens_of_the_config_count_where_generation_names_none(hub) -> None:
    (hub / "generation_config.json").write_text('{"temperature": 1.0}')
    assert companions.stop_tokens(hub, 64, [2, 11, 2]) == (2, 11)
    companions.write_generation(hub, tiny_config("*"), (2, 11))
    assert json.loads((hub / "generation_config.json").read_text()) == {
        "temperature": 1.0,
        "eos_token_id": [2, 11],
    }
