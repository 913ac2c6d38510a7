"""The terminal chat shows a turn while it is written and keeps the conversation."""

import dataclasses
import sys

import pytest

import nemotron_jax as nj
from configs import models
from nemotron_jax import chat as command
from nemotron_jax.data.chat.render import ChatOptions
from nemotron_jax.data.tokenizer import Tokenizer, train_tokenizer
from nemotron_jax.model.parameters import abstract_model
from tests.tiny_models import randomised


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["user assistant system hello there, four and two\n"], 300)


def written(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = []
    for part in (
        text.replace("</think>", "\x00</think>\x00")
        .replace("<|im_end|>", "\x00<|im_end|>")
        .split("\x00")
    ):
        name = part in tokenizer.special_tokens
        ids += [tokenizer.token_id(part)] if name else tokenizer.encode(part)
    return ids


def test_lines_are_answered_in_one_conversation(tokenizer: Tokenizer) -> None:
    prompts, shown = [], []
    turns = iter(["two and two\n</think>\nfour<|im_end|>", "</think>there<|im_end|>"])

    def writer(prompt):
        prompts.append(tokenizer.decode(prompt, show_special=True))
        return written(tokenizer, next(turns))

    lines = ["hello\n", "  \n", "and?\n", "/quit\n", "never\n"]
    messages = command.chat(
        lines, writer, tokenizer, ChatOptions(), dim="[", plain="]", show=shown.append
    )
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1] == {
        "role": "assistant",
        "content": "four",
        "reasoning_content": "two and two",
    }
    assert prompts[1].endswith(
        "four<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert "two and two" not in prompts[1]  # history loses its reasoning
    text = "".join(shown)
    assert text.replace("][", "") == "[two and two]four\nthere\n" and len(shown) > 4


def test_reset_forgets_all_but_the_system_message(tokenizer: Tokenizer) -> None:
    writer = lambda prompt: written(tokenizer, "four<|im_end|>")
    off = ChatOptions(enable_thinking=False)
    system = [{"role": "system", "content": "there"}]
    messages = command.chat(
        ["a\n", "/reset\n", "b\n"], writer, tokenizer, off, system=system, show=lambda text: None
    )
    assert [m["content"] for m in messages] == ["there", "b", "four"]


def test_the_command_answers_from_a_model_on_disk(tmp_path, tokenizer, monkeypatch, capsys) -> None:
    config = dataclasses.replace(models.tiny(), vocab_size=300, mtp=None, pattern="M*E")
    nj.save_pretrained(randomised(abstract_model(config), 0), tmp_path)
    tokenizer.save(tmp_path)
    lines = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end())
    arguments = [f"--checkpoint={tmp_path}", "--max_tokens=3", "--no_thinking", "--temperature=0"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n")
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert command.main(["--checkpoint=/nowhere"]) == 2
    assert "chat: tokenizer /nowhere" in capsys.readouterr().out


def _end():
    raise EOFError
