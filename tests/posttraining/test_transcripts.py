"""Transcripts lose no episode to what another one holds, nor to a damaged line."""

import json
import warnings

import numpy as np
import pytest

from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Verdict
from nemotron_jax.playing.episode import Episode, TurnSpan
from nemotron_jax.posttraining.transcripts import (
    Transcripts,
    page,
    read_transcripts,
    write_page,
)
from nemotron_jax.run_directory import RunDirectory

TASK = registry["arithmetic"].split(0, "train", 0)
# What str.splitlines takes for ends of lines and JSON does not, and what no encoder takes.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\x00\ufeff\ud800\udfff"


def episode(text: str = "<b>1+1</b>", group: int = 0, *, reward: float = 1, **more) -> Episode:
    turns = (TurnSpan(1, 3, True, 1, True),)
    said = {"role": "assistant", "content": text} | more
    zeros, verdict = np.zeros(3, np.float32), Verdict(reward)
    return Episode(TASK, group, (5, 6, 7), zeros, turns, False, verdict, (*TASK.messages, said))


def calling(arguments: object) -> dict:
    return {"tool_calls": [{"function": {"name": "calc", "arguments": arguments}}]}


def batches(file) -> list[int]:
    return [json.loads(line)["batch"] for line in file.read_bytes().split(b"\n") if line]


def test_transcripts_hold_each_batch_once_and_their_page_is_safe(tmp_path) -> None:
    first = Transcripts(RunDirectory(tmp_path), keep=2)
    for number in range(3):
        first.add(number, [episode(group=group) for group in (0, 0, 1)], [1.0, 0.0, 0.5])
    file = tmp_path / "transcripts.jsonl"
    file.write_text(file.read_text("utf-8") + '{"batch": 3, "gro', "utf-8")
    Transcripts(RunDirectory(tmp_path), keep=2).add(2, [episode(group=7)], [0.5])
    lines = read_transcripts(file)
    assert [(line["batch"], line["group"]) for line in lines] == [
        (0, 0),
        (0, 0),
        (1, 0),
        (1, 0),
        (2, 7),
    ]
    shown = page(lines)
    assert shown.count("<h2>") == 3 and "batch 0, group 0 · mean reward 0.50 of 2" in shown
    assert shown.count("<details") == 5
    assert "<b>1+1</b>" not in shown and "&lt;b&gt;1+1&lt;/b&gt;" in shown


@pytest.mark.parametrize("character", SEPARATORS, ids=ascii)
def test_no_character_of_one_episode_costs_another(tmp_path, character) -> None:
    file, text = tmp_path / "transcripts.jsonl", f"a{character}b"
    for number in range(4):
        one = episode(text, reasoning_content=text, **calling({text: [text]}))
        Transcripts(RunDirectory(tmp_path), 4).add(
            number, [one if number == 1 else episode()], [1.0]
        )
    found = read_transcripts(file)
    assert [one["batch"] for one in found] == batches(file) == [0, 1, 2, 3]
    whole = "a\ufffdb" if "\ud800" <= character <= "\udfff" else text
    assert found[1]["messages"][-1]["content"] == whole
    assert found[1]["messages"][-1]["tool_calls"][0]["function"]["arguments"] == {whole: [whole]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is damaged
        Transcripts(RunDirectory(tmp_path), 4).add(3, [episode()], [1.0])
    assert batches(file) == [0, 1, 2, 3]
    assert write_page(RunDirectory(tmp_path)).read_text("utf-8").count("<details") == 4


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = {
    "very deep": deep(100_000),
    "deep": deep(400),
    "a huge number": 10**5000,
    "no number": float("nan"),
    "a set below a number": {1: {2}},
    "an object": object(),
    "bytes": b"\xff",
}


@pytest.mark.parametrize("kind", VALUES)
def test_whatever_an_environment_made_is_written_down(tmp_path, kind) -> None:
    """Arguments of a call, a verdict's answer: of any type and depth."""
    one = episode(**calling({"x": VALUES[kind]}))
    object.__setattr__(one.verdict, "answer", VALUES[kind])
    Transcripts(RunDirectory(tmp_path), 4).add(0, [one, episode()], [1.0, 0.0])
    assert len(read_transcripts(tmp_path / "transcripts.jsonl")) == 2
    write_page(RunDirectory(tmp_path))


DAMAGE = {
    "a flipped byte": lambda line: line.replace(b'"batch": 2', b'"batch"; 2'),
    "no UTF-8": lambda line: line.replace(b"1+1", b"\xff"),
    "zeros": lambda line: line[:40] + bytes(4096) + line[40:],
    "a list": lambda line: b"[1]",
    "a number": lambda line: b"7",
    "nothing": lambda line: b"",
    "null": lambda line: b"null",
    "another object": lambda line: b'{"batch": 2}',
    "deep": lambda line: b"[" * 100_000,
    "deep inside": lambda line: line[:-1] + b', "more": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "cut": lambda line: line[:-20],
    "text as a message": lambda line: line.replace(b'"messages": [', b'"messages": ["no", '),
    "a call without a name": lambda line: line.replace(
        b'"content": "<b>', b'"tool_calls": [7], "content": "<b>'
    ),
    "a huge number": lambda line: line.replace(b'"batch": 2', b'"batch": ' + b"9" * 5000),
    "no number": lambda line: line.replace(b'"reward": 1.0', b'"reward": NaN'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_costs_itself_alone(tmp_path, kind) -> None:
    file = tmp_path / "transcripts.jsonl"
    run = Transcripts(RunDirectory(tmp_path), 4)
    for number in range(5):
        run.add(number, [episode()], [1.0])
    lines = file.read_bytes().split(b"\n")
    lines[2] = DAMAGE[kind](lines[2])
    lines[5] = b'{"batch": 5, "mess'  # a kill cut this one short, which is no damage
    file.write_bytes(b"\n".join(lines))
    before = file.read_bytes()
    assert [one["batch"] for one in read_transcripts(file)] == [0, 1, 3, 4]
    write_page(RunDirectory(tmp_path))
    with pytest.warns(UserWarning, match=r"lines 3 are damaged.*transcripts.jsonl.damaged"):
        Transcripts(RunDirectory(tmp_path), 4).add(4, [episode()], [1.0])
    assert batches(file) == [0, 1, 3, 4]
    assert (tmp_path / "transcripts.jsonl.damaged").read_bytes() == before


def test_a_page_shows_content_of_any_kind(tmp_path) -> None:
    parts = [{"type": "text", "text": "<i>"}]
    for content in (parts, None, 7, {"a": 1}):
        one = episode(reasoning_content=content)
        Transcripts(RunDirectory(tmp_path), 4).add(0, [one], [1.0])
        line = read_transcripts(tmp_path / "transcripts.jsonl")[0]
        line["messages"][-1]["content"] = content
        assert "<i>" not in page([line])
