"""The terminal chat shows a turn while it is written and keeps the conversation."""

import dataclasses
import re
import sys

import numpy as np
import pytest

import nemotron_jax as nj
from configs import models
from nemotron_jax import terminal as command
from nemotron_jax.data.chat.render import ChatOptions
from nemotron_jax.data.tokenizer import Tokenizer, train_tokenizer
from nemotron_jax.model.parameters import abstract_model
from tests.decoding.engines import quick_programs
from tests.tiny_models import randomised

__all__ = ["quick_programs"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["user assistant system hello there, four and two\n"], 300)


def written(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = []
    for part in (
        re.sub("</?(think|tool_call)>", "\x00\\g<0>\x00", text)
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


CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=to>\nfour\n"
    "</parameter>\n</function>\n</tool_call>\n<|im_end|>"
)


def answered(tokenizer: Tokenizer, *turns: str, limit: int | None = None) -> tuple[list, str]:
    """The conversation and what is shown where the model writes these turns."""
    left, shown = iter(turns), []
    writer = lambda prompt: iter(written(tokenizer, next(left))[:limit])
    off = ChatOptions(enable_thinking=False)
    lines = ["hello\n"] * len(turns)
    messages = command.chat([*lines, "/help\n"], writer, tokenizer, off, show=shown.append)
    return messages, "".join(shown)


def test_a_call_is_shown_with_its_arguments(tokenizer: Tokenizer) -> None:
    messages, text = answered(tokenizer, CALL)
    assert '[calls add {"a": 1, "to": "four"}]' in text and "/reset" in text
    assert messages[1]["tool_calls"][0]["function"]["name"] == "add"


def test_an_answer_that_is_cut_off_says_so(tokenizer: Tokenizer) -> None:
    whole = len(written(tokenizer, "four and two<|im_end|>"))
    _, text = answered(tokenizer, "four and two<|im_end|>", limit=whole - 1)
    assert f"[cut off after {whole - 1} tokens" in text
    for limit in (whole, whole + 1):
        assert "cut off" not in answered(tokenizer, "four and two<|im_end|>", limit=limit)[1]


def test_an_interrupt_ends_the_answer_and_not_the_chat(tokenizer: Tokenizer) -> None:
    prompts, shown = [], []

    def writer(prompt):
        prompts.append(tokenizer.decode(prompt, show_special=True))
        if len(prompts) < 3:
            yield from tokenizer.encode("four" if len(prompts) == 1 else "")
            raise KeyboardInterrupt
        yield from written(tokenizer, "two<|im_end|>")

    off = ChatOptions(enable_thinking=False)
    lines = ["a\n", "b\n", "\udc80c\n"]
    messages = command.chat(lines, writer, tokenizer, off, show=shown.append)
    assert "".join(shown).count("[interrupted]") == 2
    said = [message["content"] for message in messages]
    assert said == ["a", "four", "\ufffdc", "two"]  # a question without any answer is forgotten


def test_the_command_answers_from_a_model_on_disk(tmp_path, tokenizer, monkeypatch, capsys) -> None:
    config = dataclasses.replace(models.tiny(), vocab_size=300, mtp=None, pattern="M*E")
    nj.save_pretrained(randomised(abstract_model(config), 0), tmp_path)
    tokenizer.save(tmp_path)
    lines = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end())
    arguments = [f"--checkpoint={tmp_path}", "--max_tokens=3", "--max_length=128"]
    arguments += ["--no_thinking", "--temperature=0"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(": compiling") and "/help" in out[1]
    assert "[cut off after 3 tokens" in out[-1]
    options = {"max_new_tokens": 3, "enable_thinking": False}
    turn = nj.chat(nj.load_pretrained(tmp_path), "hello", **options)
    assert "\n".join(out[2:-1]) == turn.content and turn.finish_reason == "length"
    assert not turn.reasoning and turn.calls == ()
    check_texts(nj.load_pretrained(tmp_path), tokenizer)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert command.main(["--checkpoint=/nowhere"]) == 2
    assert "chat: tokenizer /nowhere" in capsys.readouterr().out
    with pytest.raises(ValueError, match="pass nj.load_tokenizer"):
        nj.chat(abstract_model(config), "hello")
    with pytest.raises(ValueError, match="budget=3: must be None with enable_thinking=False"):
        nj.chat(abstract_model(config), "hello", budget=3, enable_thinking=False)


def check_texts(model, tokenizer) -> None:
    """`nj.generate` of texts gives what their ids give, and the new text."""
    texts = ["hello", "two four"]
    result = nj.generate(model, texts, 3)
    assert np.array_equal(
        result.tokens, nj.generate(model, list(map(tokenizer.encode, texts)), 3).tokens
    )
    assert result.texts == tuple(map(tokenizer.decode, result.tokens))
    assert nj.generate(model, "hello", 3).texts == result.texts[:1]
    with pytest.raises(ValueError, match="prompt 1 is 7 beside texts; give texts alone"):
        nj.generate(model, ["hello", 7])


def _end():
    raise EOFError
