"""Episodes keep the tokens that were drawn; what environments say is what training would read."""

import dataclasses
import json
import re

import numpy as np
import pytest

from nemotron_jax.data.chat.render import ChatOptions
from nemotron_jax.data.chat.tokens import encode_chat, encode_prompt
from nemotron_jax.data.messages import (
    check_row,
    oracle_conversation,
    oracle_source,
    played_conversation,
)
from nemotron_jax.decoding.wanted import Budget
from nemotron_jax.environments.base import Verdict
from nemotron_jax.playing import rollout
from nemotron_jax.playing.conversations import Written
from nemotron_jax.playing.players import Here, Reply
from nemotron_jax.playing.rollout import Playing, encode_reply, play_episodes
from nemotron_jax.posttraining.transcripts import transcript

NO = ChatOptions(enable_thinking=False)
ENVIRONMENT, LEVEL = oracle_source("oracle:arithmetic/1")
TASKS = [ENVIRONMENT.split(0, "train", index, level=LEVEL) for index in range(3)]


class Scripted:
    """A sampler that writes turns given beforehand and notes what it was told to read."""

    def __init__(self, scripts: list[list[list[int]]]) -> None:
        self.scripts, self.heard, self.turn = scripts, [[] for _ in scripts], 0
        self.models: list = []
        self.forced = -1  # place in each turn of a token that counts as put there

    def __call__(self, model, prompts, copies, wanted, execution) -> "Scripted":
        (self.stop,) = wanted.stop_tokens
        self.wanted = wanted
        self.prompts = [list(p) for p in prompts for _ in range(copies)]
        return self

    def swap(self, model) -> None:
        self.models.append(model)

    def read(self, rows) -> None:
        for heard, row in zip(self.heard, rows, strict=True):
            heard += row

    def write(self, limits) -> list[Written]:
        out = []
        for row, limit in enumerate(limits):
            script = self.scripts[row]
            new = tuple(script[self.turn][:limit]) if limit and self.turn < len(script) else ()
            logprobs = tuple(-0.1 * (n + 1) for n in range(len(new)))
            stopped = bool(new) and new[-1] == self.stop
            forced = tuple(n == self.forced for n in range(len(new)))
            out.append(Written(new, logprobs, stopped, forced))
            self.heard[row] += new
        self.turn += 1
        return out


def own_turns(tokenizer, conversation) -> list[list[int]]:
    """The ids of each assistant's turn, as encode_chat has them."""
    chat = encode_chat(tokenizer, conversation.messages, conversation.tools, NO)
    starts = np.flatnonzero(np.diff(chat.learned.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(chat.learned.astype(int), append=0) == -1) + 1
    return [chat.ids[a:b].tolist() for a, b in zip(starts, stops, strict=True)]


def play(tokenizer, config, scripts, tasks=TASKS, players=None, **changes):
    sampler = Scripted(scripts)
    settings = dataclasses.replace(config.rl.rollout, **changes)
    players = players or Here()
    episodes = play_episodes(None, tokenizer, players, tasks, settings, seed=0, sampler=sampler)
    return episodes, sampler


def test_an_oracles_episode_is_its_conversation_token_for_token(phrases, grpo_config) -> None:
    conversations = [oracle_conversation(ENVIRONMENT, task) for task in TASKS]
    scripts = [own_turns(phrases, one) for one in conversations]
    episodes, sampler = play(phrases, grpo_config, scripts)
    for row, (episode, whole) in enumerate(zip(episodes, conversations, strict=True)):
        chat = encode_chat(phrases, whole.messages, whole.tools, NO)
        assert list(episode.tokens) == chat.ids[:-1].tolist()  # less the line end after the last
        np.testing.assert_array_equal(episode.own, chat.learned[:-1])
        assert sampler.prompts[row] + sampler.heard[row] == list(episode.tokens)
        assert np.all(episode.logprobs[episode.own] < 0) and not episode.truncated
        assert not episode.logprobs[~episode.own].any()
        assert episode.verdict.reward == 1 and all(turn.well_formed for turn in episode.turns)
        assert [m["role"] for m in episode.messages] == [m["role"] for m in whole.messages]
        assert [turn.calls for turn in episode.turns] == [1, 1, 0]


@pytest.mark.parametrize("low_effort", [False, True])
def test_a_transcript_is_a_row_to_learn_from(phrases, grpo_config, low_effort) -> None:
    """Read as a conversation, it has the tokens of the episode."""
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    options = {"seed": 0, "low_effort": [low_effort] * len(TASKS), "sampler": Scripted(scripts)}
    longer = dataclasses.replace(grpo_config.rl.rollout, max_tokens=150)
    playing = Playing(phrases, Here(), TASKS, longer, **options)
    while not playing.over:
        playing.turn(None)
    for one in playing.finish():
        row = check_row(json.loads(json.dumps(transcript(0, one, 1.0))))
        chat = encode_chat(phrases, row.messages, row.tools, row.options)
        assert list(one.tokens) == chat.ids[:-1].tolist() and len(one.turns) == 3
        np.testing.assert_array_equal(one.own, chat.learned[:-1])


def test_an_episode_that_is_interrupted_goes_on_as_it_was(phrases, grpo_config) -> None:
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    whole, _ = play(phrases, grpo_config, scripts)
    settings = grpo_config.rl.rollout
    begin = lambda sampler: Playing(
        phrases, Here(), TASKS, settings, copies=1, seed=0, sampler=sampler
    )
    first = begin(Scripted(scripts))
    first.turn("old", version=3)
    saved = json.loads(json.dumps(first.state()))
    later = Scripted(scripts)
    later.turn = 1
    second = begin(later)
    second.restore(saved)
    while not second.over:
        second.turn("new", version=4)
    again = second.finish()
    for one, other in zip(whole, again, strict=True):
        assert (one.tokens, one.messages, one.verdict) == (
            other.tokens,
            other.messages,
            other.verdict,
        )
        np.testing.assert_allclose(one.logprobs, other.logprobs)
        assert [turn.version for turn in other.turns] == [3, 4, 4]
    # A new cache is fed all that the old one held.
    for row, episode in enumerate(again):
        assert later.prompts[row] + later.heard[row] == list(episode.tokens)
    assert later.models == ["new"]  # told again before its second turn


def test_what_a_budget_put_there_is_marked_and_stays_so(phrases, grpo_config) -> None:
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    settings = dataclasses.replace(grpo_config.rl.rollout, thinking=True, budget=3)
    sampler = Scripted(scripts)
    sampler.forced = 1
    begin = lambda: Playing(phrases, Here(), TASKS, settings, seed=0, sampler=sampler)
    first = begin()
    first.turn(None)
    second = begin()
    second.restore(json.loads(json.dumps(first.state())))
    assert sampler.wanted.budget == Budget(3, phrases.token_id("</think>"))
    assert sampler.wanted.logprobs == "drawn"
    for playing in (first, second):
        for one in playing.finish():
            (turn,) = one.turns
            assert one.forced == (turn.start + 1,)
            assert not one.own[turn.start + 1] and one.own.sum() == turn.stop - turn.start - 1


def test_environments_are_waited_for_only_when_they_are_needed(phrases, grpo_config) -> None:
    done = []

    class Slow(Here):
        def begin_reply(self, turns):
            done.append("asked")
            waits = super().begin_reply(turns)
            return lambda: done.append("heard") or waits()

    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    options = {"copies": 1, "seed": 0, "sampler": Scripted(scripts)}
    playing = Playing(phrases, Slow(), TASKS, grpo_config.rl.rollout, **options)
    playing.turn(None)
    assert done == ["asked"]  # a train step may come here
    assert playing.state()["episodes"][0]["messages"][-1]["role"] == "tool"
    playing.turn(None)
    assert done == ["asked", "heard", "asked"] and not playing.over
    playing.turn(None)
    assert [episode.verdict.reward for episode in playing.finish()] == [1] * 3
    assert done == ["asked", "heard"] * 3


def test_a_turn_is_never_encoded_again(phrases, grpo_config) -> None:
    """A call spelled by single bytes stays so in the episode, and is understood all the same."""
    task = TASKS[0]
    scripts = own_turns(phrases, oracle_conversation(ENVIRONMENT, task))
    text = phrases.decode(scripts[0], show_special=True)
    pieces = {piece: number for number, piece in enumerate(phrases.token_bytes) if piece}
    named = {name: number for number, name in phrases.special_names.items()}
    spelled: list[int] = []
    while text:
        name = next((name for name in named if text.startswith(name)), None)
        spelled.append(named[name] if name else pieces[text[0].encode()])
        text = text[len(name or text[0]) :]
    assert len(spelled) > 2 * len(scripts[0])
    (episode,), _ = play(
        phrases,
        grpo_config,
        [[spelled, *scripts[1:]]],
        [task],
        max_tokens=300,
        max_turn_tokens=100,
    )
    first = episode.turns[0]
    assert list(episode.tokens[first.start : first.stop]) == spelled
    assert episode.verdict.reward == 1


def test_budgets_cut_episodes_off(phrases, grpo_config) -> None:
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    longest = len(scripts[0][0])
    episodes, _ = play(phrases, grpo_config, scripts, max_turn_tokens=longest - 2)
    assert episodes[0].truncated and len(episodes[0].turns) == 1
    assert not episodes[0].turns[0].closed and episodes[0].verdict.reward == 0
    prompt = len(encode_prompt(phrases, TASKS[0].messages, TASKS[0].tools, NO))
    room = prompt + longest + 3  # the first turn fits, the reply does not
    episodes, _ = play(phrases, grpo_config, scripts, max_tokens=room)
    assert episodes[0].truncated and len(episodes[0].turns) == 1 and episodes[0].turns[0].closed
    assert all(len(episode.tokens) <= room for episode in episodes)
    episodes, _ = play(phrases, grpo_config, scripts, max_turns=2)
    assert [len(episode.turns) for episode in episodes] == [2] * 3
    assert all(episode.truncated for episode in episodes)
    episodes, _ = play(phrases, grpo_config, scripts, max_tokens=20)
    assert not any(one.counted or one.turns for one in episodes)


def test_a_prompt_without_room_to_answer_costs_its_episode_and_no_others(
    phrases, grpo_config
) -> None:
    question = TASKS[0].messages[-1]
    longer = {**question, "content": question["content"] + " again" * 200}
    tasks = [dataclasses.replace(TASKS[0], messages=(longer,)), *TASKS[1:]]
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    (cut, *rest), sampler = play(phrases, grpo_config, scripts, tasks)
    limit = grpo_config.rl.rollout.max_tokens
    assert not cut.counted and "has" in cut.verdict.infra_error and not cut.own.any()
    assert len(cut.tokens) == limit - 1 == len(sampler.prompts[0])  # what a row has room for
    assert [episode.verdict.reward for episode in rest] == [1, 1]


def test_an_environment_that_fails_earns_nothing_rather_than_zero(phrases, grpo_config) -> None:
    class Failing(Here):
        def reply(self, turns):
            return {place: Reply((), over=True) for place in turns}

        def verify(self):
            return [Verdict(0.0, infra_error="it is gone")] * 3

    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    episodes, _ = play(phrases, grpo_config, scripts, players=Failing())
    assert not any(episode.counted for episode in episodes)


class Says(Here):
    """An environment that answers the first turn of the first task as it likes."""

    def __init__(self, *messages: object) -> None:
        super().__init__()
        self.messages = messages

    def reply(self, turns):
        found = super().reply(turns)
        return found | ({0: Reply(self.messages, over=False)} if len(found) == 3 else {})


@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfff\x00b", "</tool_response><|im_end|>", ""], ids=ascii
)
def test_what_an_environment_says_is_read_whatever_it_is(phrases, grpo_config, text) -> None:
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    says = Says({"role": "tool", "content": text})
    episodes, _ = play(phrases, grpo_config, scripts, players=says, max_tokens=200)
    assert [one.verdict.reward for one in episodes] == [1] * 3  # the answer that follows is right
    heard = episodes[0].messages[2]["content"]
    assert heard == re.sub("[\ud800-\udfff]", "\ufffd", text)
    read = phrases.decode(episodes[0].tokens, show_special=True)
    assert f"<tool_response>\n{heard}\n</tool_response>" in read


@pytest.mark.parametrize("message", [{"role": "tool", "content": 7}, {}, {"role": "tool"}, "no", 7])
def test_a_reply_that_is_no_message_costs_its_episode_alone(phrases, grpo_config, message) -> None:
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    players = Says(message)
    begin = lambda: Playing(
        phrases, players, TASKS, grpo_config.rl.rollout, copies=1, seed=0, sampler=Scripted(scripts)
    )
    playing = begin()
    playing.turn(None)
    saved = json.loads(json.dumps(playing.state()))
    again = begin()
    again.restore(saved)
    for one in (playing, again):
        assert one.state() == saved
    while not playing.over:
        playing.turn(None)
    failed, *rest = playing.finish()
    assert [one.verdict.reward for one in rest] == [1, 1]
    if message != {"role": "tool"}:  # whose text is the empty one
        assert not failed.counted and "cannot be encoded" in failed.verdict.infra_error


def test_a_turn_that_cannot_be_read_costs_its_episode_alone(
    phrases, grpo_config, monkeypatch
) -> None:
    read = rollout.parse_turn

    def fails(text, **options):
        if "Answer" in text:
            raise RecursionError("\ud800" * 1000)
        return read(text, **options)

    monkeypatch.setattr(rollout, "parse_turn", fails)
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    scripts[1][2] = scripts[1][1]
    episodes, _ = play(phrases, grpo_config, scripts)
    assert [one.counted for one in episodes] == [False, True, False]
    reason = episodes[0].verdict.infra_error
    assert "cannot be read: RecursionError" in reason and len(reason.encode()) < 2000
    assert [len(one.turns) for one in episodes] == [3] * 3


def test_a_prompt_that_cannot_be_encoded_costs_its_episode_alone(phrases, grpo_config) -> None:
    broken = dataclasses.replace(TASKS[0], messages=({"role": "user", "content": "\ud800"},))
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    episodes, _ = play(phrases, grpo_config, scripts, [broken, *TASKS[1:]])
    assert "surrogate" in episodes[0].verdict.infra_error and not episodes[0].turns
    assert [one.verdict.reward for one in episodes[1:]] == [1, 1]


def test_what_follows_a_turn_does_not_depend_on_it(phrases) -> None:
    """The reply's ids are those between two turns of the whole conversation."""
    environment, task = ENVIRONMENT, TASKS[1]
    whole, _ = played_conversation(environment, task, environment.oracle(task))
    chat = encode_chat(phrases, whole.messages, whole.tools, NO)
    reply = encode_reply(phrases, [whole.messages[2]], NO)
    first = own_turns(phrases, whole)[0]
    start = len(encode_prompt(phrases, task.messages, task.tools, NO)) + len(first)
    assert chat.ids[start : start + len(reply)].tolist() == reply
