"""Held-out tasks are played as a model writes: right turns succeed, wrong or broken ones fail."""

import dataclasses

import numpy as np
import pytest

from configs import sft_tiny
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.chat.render import END
from nemotron_jax.data.conversations import prepare_conversations
from nemotron_jax.data.messages import oracle_conversation, oracle_source
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generate import Generated
from nemotron_jax.environments.base import Verdict
from nemotron_jax.posttraining import sft
from tests.playing.alone import Alone

SOURCE = "oracle:arithmetic/1"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    config = from_config_dict(RunConfig, sft_tiny.get_config())
    few = dataclasses.replace(config.sft, oracle_tasks=5)
    folder = tmp_path_factory.mktemp("sft")
    return prepare_conversations(config.data, few, 704, folder, progress=lambda line: None)[0]


def tasks(count: int) -> list:
    environment, level = oracle_source(SOURCE)
    made = (environment.split(0, "held_out", index, level=level) for index in range(count))
    return [(environment, task) for task in made]


def player(tokenizer: Tokenizer, wanted: list, spoil: dict[int, str]):
    """A `generate` that knows each prompt's next turn; of rows in `spoil` it writes that text."""
    whole = {}
    for place, (environment, task) in enumerate(wanted):
        one = oracle_conversation(environment, task)
        for index, message in enumerate(one.messages):
            if message["role"] == "assistant":
                prompt = sft.encode_prompt(tokenizer, one.messages[:index], one.tools, NO)
                ids = sft.encode_prompt(tokenizer, one.messages[: index + 1], one.tools, NO)
                whole[place, tuple(prompt)] = ids[len(prompt) :]
    end = tokenizer.token_id(END)

    def generate(model, rows, max_new_tokens, *, stop_tokens, **options) -> Generated:
        assert stop_tokens == (end,)
        out = np.zeros((len(rows), max_new_tokens), np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for place, row in enumerate(rows):
            ids = whole[place, tuple(row)] if place not in spoil else []
            new = tokenizer.encode(spoil[place]) if place in spoil else ids
            new = list(new)[: list(new).index(end) + 1 if end in new else max_new_tokens]
            out[place, : len(new)], lengths[place] = new, len(new)
        return Generated(out, lengths, np.zeros(out.shape, np.float32))

    return generate


NO = sft.NO_THINKING


def test_turns_of_the_oracle_succeed_and_others_fail(tokenizer, monkeypatch) -> None:
    wanted = tasks(6)
    spoil = {1: "I do not know", 3: "<tool_call>\n<function=calc>"}
    monkeypatch.setattr(sft, "generate", player(tokenizer, wanted, spoil))
    played = sft.play_tasks(None, tokenizer, wanted, max_new_tokens=64)
    assert [verdict.reward for _, verdict in played] == [1, 0, 1, 0, 1, 1]
    conversation = oracle_conversation(*wanted[0])
    assert [m["role"] for m in played[0][0]] == [m["role"] for m in conversation.messages]
    assert played[0][0][-1]["content"] == conversation.messages[-1]["content"]


def test_tasks_that_share_what_one_at_a_time_can_have_are_all_played(
    tokenizer, monkeypatch
) -> None:
    wanted = tasks(3)
    monkeypatch.setattr(sft, "generate", player(tokenizer, wanted, {}))
    alone = Alone(wanted[0][0])
    played = sft.play_tasks(None, tokenizer, [(alone, t) for _, t in wanted], max_new_tokens=64)
    assert [verdict.reward for _, verdict in played] == [1, 1, 1]


class Broken:
    """An environment of somebody's own whose sessions answer as they like, or raise."""

    def __init__(self, environment, method: str, answer: object) -> None:
        self._environment, self._method, self._answer = environment, method, answer

    def start(self, task):
        session = self._environment.start(task)
        setattr(session, self._method, self._give)
        return session

    def _give(self, *unused: object) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("reply", RecursionError("\ud800")),
        ("reply", ({"role": "tool", "content": 7},)),
        ("reply", ("no message",)),
        ("reply", None),
        ("verify", RuntimeError("gone")),
    ],
)
def test_what_fails_in_one_task_costs_no_other(tokenizer, monkeypatch, method, answer) -> None:
    wanted = tasks(3)
    monkeypatch.setattr(sft, "generate", player(tokenizer, wanted, {}))
    broken = (Broken(wanted[1][0], method, answer), wanted[1][1])
    played = sft.play_tasks(None, tokenizer, [wanted[0], broken, wanted[2]], max_new_tokens=64)
    assert [verdict.reward for _, verdict in played] == [1, 0, 1]
    assert [verdict.infra_error is None for _, verdict in played] == [True, False, True]


def test_a_tools_reply_of_half_a_pair_is_read(tokenizer, monkeypatch) -> None:
    (environment, task), rows_seen = tasks(1)[0], []

    def silent(model, rows, count, **options) -> Generated:
        rows_seen.append(rows[0])
        return Generated(
            np.zeros((1, count), np.int32), np.zeros(1, np.int32), np.zeros((1, count))
        )

    class Says(Broken):
        def _give(self, turn: object) -> tuple:
            self.session.over = len(rows_seen) == 2
            return ({"role": "tool", "content": "\ud800"},)

        def start(self, task):
            self.session = super().start(task)
            return self.session

    monkeypatch.setattr(sft, "generate", silent)
    says = Says(environment, "reply", None)
    ((messages, verdict),) = sft.play_tasks(None, tokenizer, [(says, task)], max_new_tokens=4)
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["\ufffd"] * 2
    assert verdict.infra_error is None and "\ufffd" in tokenizer.decode(rows_seen[1])


def test_success_is_the_mean_over_the_oracle_sources_held_out_tasks(tokenizer, monkeypatch) -> None:
    config = from_config_dict(RunConfig, sft_tiny.get_config())
    sources = dataclasses.replace(config.data, sources=(SOURCE,))
    four = dataclasses.replace(config.sft, success_tasks=4)
    config = dataclasses.replace(config, data=sources, sft=four)
    monkeypatch.setattr(sft, "generate", player(tokenizer, tasks(4), {2: "no"}))
    evaluate = sft.success_evaluator(tokenizer, config)
    assert evaluate(None, config.execution) == {"success": 0.75}
    silent = dataclasses.replace(config, sft=dataclasses.replace(four, success_tasks=0))
    assert sft.success_evaluator(tokenizer, silent) is None


def test_success_is_that_of_the_plays_that_count(tokenizer, monkeypatch) -> None:
    config = from_config_dict(RunConfig, sft_tiny.get_config())
    verdicts = [Verdict(1.0), Verdict(0.0), Verdict(0.0, infra_error="gone")]
    monkeypatch.setattr(sft, "play_tasks", lambda *given, **options: [([], v) for v in verdicts])
    evaluate = sft.success_evaluator(tokenizer, config)
    assert evaluate(None, None) == {"success": 0.5}
    del verdicts[:2]
    assert evaluate(None, None) == {"success": 0.0}
