"""transformers applies the chat template that goes along with a model as it is rendered here."""

import dataclasses
import json
import pathlib

import pytest

from nemotron_jax.data import companions
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.run_directory import RunDirectory
from tests.tiny_models import tiny_config

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.hf
RENDERS = pathlib.Path(__file__).parents[1] / "golden/chat/renders.json"


def test_transformers_renders_every_reference_conversation(tmp_path):
    tokenizer = train_tokenizer(["a few words"], 300)
    run = RunDirectory(tmp_path)
    tokenizer.save(tmp_path)
    model = dataclasses.replace(tiny_config("*"), vocab_size=512)
    companions.keep(run, model, "", chats=True)
    tokenizer.save(run.companions)
    theirs = transformers.AutoTokenizer.from_pretrained(run.companions)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (11, 1)
    for case in json.loads(RENDERS.read_text("utf-8")):
        found = theirs.apply_chat_template(
            case["messages"],
            tools=case["tools"],
            add_generation_prompt=case["add_generation_prompt"],
            tokenize=False,
            **case["chat_template_kwargs"],
        )
        assert found == case["rendered"], case["name"]
