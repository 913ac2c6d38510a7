"""Comparisons in a ring and what is added for length, by hand."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from nemotron_jax.config.rl import PreferenceConfig
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Verdict
from nemotron_jax.playing.episode import Episode, TurnSpan
from nemotron_jax.posttraining.preference import (
    EndpointJudge,
    make_judge,
    preference_rewards,
    ring,
    ring_scores,
    rule_judge,
    shaping,
    smallness,
)
from nemotron_jax.posttraining.verdicts import Comparison

TASK = registry["arithmetic"].split(0, "train", 0)
PLAIN = PreferenceConfig(judge="rules", reasoning_weight=0, answer_weight=0, style_weight=0)


def answer(
    reward: float, text: str = "", group: int = 0, infra: str | None = None, thought: str = ""
) -> Episode:
    message = {"role": "assistant", "content": text, "reasoning_content": thought}
    turns = (TurnSpan(0, 1, True, 0, True),)
    verdict = Verdict(reward, infra_error=infra)
    return Episode(TASK, group, (1,), np.zeros(1, np.float32), turns, False, verdict, (message,))


def test_each_has_the_mean_score_of_its_comparisons() -> None:
    members = [answer(reward) for reward in (0.9, 0.1, 0.5, 0.5)]
    np.testing.assert_allclose(preference_rewards(members, PLAIN, rule_judge), [4.3, 2.7, 3.5, 3.5])
    np.testing.assert_allclose(preference_rewards(members[:2], PLAIN, rule_judge), [4.3, 2.7])
    assert preference_rewards(members[:1], PLAIN, rule_judge).tolist() == [3]
    assert ring(5) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
    assert ring(2) == [(0, 1), (1, 0)] and not ring(1) and not ring(0)
    # Of four comparisons two were judged; the second is a tie that its ranking breaks.
    found = ring_scores([Comparison(5, 1), None, Comparison(3, 3, ranking=2), None], 4)
    np.testing.assert_allclose(found, [5, 1, 4.5, 1.5])
    half = ring_scores([None, Comparison(4, 2), None, None], 4)
    assert np.isnan(half).tolist() == [True, False, False, True]


def test_a_judge_of_preferences_alone_is_on_the_scale_of_scores() -> None:
    members = [answer(0), answer(0), answer(0)]
    said = {(0, 1): 1.0, (1, 2): 0.5, (2, 0): 0.0}
    place = {id(one): n for n, one in enumerate(members)}
    judge = lambda first, second: said[place[id(first)], place[id(second)]]
    # The first wins twice, at 4.5; the others lose to it, at 2.5, and tie with each other, at 3.5.
    np.testing.assert_allclose(preference_rewards(members, PLAIN, judge), [4.5, 3, 3])
    # One who always prefers the first it is shown prefers neither of two.
    np.testing.assert_allclose(preference_rewards(members[:2], PLAIN, lambda *pair: 1.0), [3.5] * 2)


def test_equal_rewards_are_told_apart_by_their_form() -> None:
    right, cut = answer(1), dataclasses.replace(answer(1), truncated=True)
    broken = dataclasses.replace(answer(1), turns=(TurnSpan(0, 1, False, 0, True),))
    assert rule_judge(right, answer(1)).scores() == (4.5, 4.5)
    assert rule_judge(right, broken).scores() == (5, 4)
    assert rule_judge(broken, cut).scores() == (4, 5)
    assert rule_judge(answer(0), right).scores() == (2.5, 4.5)


def test_a_wrong_answer_does_not_win_by_being_short() -> None:
    """Under the coefficients of the released stage of preferences; figures by hand."""
    config = dataclasses.replace(
        PLAIN, reasoning_weight=0.3, answer_weight=0.35, style_weight=0.05, shortest_bonus=0.5
    )
    lengths = [(900, 300), (100, 50), (500, 150), (300, 100)]
    members = [
        answer(n == 0, "a" * written, thought="r" * thought)
        for n, (thought, written) in enumerate(lengths)
    ]
    weights = lambda values: (
        (1 - (values - values.min()) / np.ptp(values))
        - np.mean(1 - (values - values.min()) / np.ptp(values))
    )
    thoughts, written = np.array(lengths, float).T
    wanted = np.array([4.5, 2.5, 2.5, 2.5]) + 0.3 * weights(thoughts) + 0.35 * weights(written)
    found = preference_rewards(members, config, rule_judge)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found[0] - found[1:].max() > 1


def test_comparisons_are_asked_for_at_one_time() -> None:
    """Each waits for the others: one after the other they would wait for ever."""
    meet = threading.Barrier(6, timeout=60)

    def judge(first: Episode, second: Episode) -> float:
        meet.wait()
        return rule_judge(first, second)

    episodes = [answer(n / 8, group=n % 2) for n in range(6)]
    config = dataclasses.replace(PLAIN, judge_calls=6)
    found = preference_rewards(episodes, config, judge)
    np.testing.assert_array_equal(found, preference_rewards(episodes, PLAIN, rule_judge))


def test_groups_are_apart_and_failures_are_no_number() -> None:
    pairs = [(1, 0), (0, 0), (0, 1), (1, 1), (1, 2)]
    episodes = [answer(reward, group=group) for reward, group in pairs]
    episodes.append(answer(0, group=2, infra="gone"))
    found = preference_rewards(episodes, PLAIN, rule_judge)
    np.testing.assert_allclose(found, [4.5, 2.5, 2.5, 4.5, 3, np.nan])
    silent = preference_rewards(episodes[:2], PLAIN, lambda first, second: None)
    assert np.isnan(silent).all()


def test_short_and_plain_answers_gain_what_long_ones_lose() -> None:
    np.testing.assert_allclose(smallness(np.array([10.0, 20.0, 40.0])), [4 / 9, 1 / 9, -5 / 9])
    assert smallness(np.array([3.0, 3.0])).tolist() == [0, 0]
    members = [answer(1, "x" * 10), answer(1, "x" * 20), answer(0, "x" * 40)]
    config = PreferenceConfig(judge="rules", answer_weight=0.9, shortest_bonus=0)
    scores = np.array([1, 1, 0], np.float32)
    np.testing.assert_allclose(shaping(members, scores, config), [0.4, 0.1, -0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "texts", "thoughts", "gains"),
    [
        ([1, 0.5, 0], ("xx", "xxx", "x" * 9), ("", "", ""), [1, 0, 0]),
        ([0.5, 1, 0], ("xx", "xxx", "x" * 9), ("", "", ""), [0, 0, 0]),  # not by its reward
        ([1, 0.5, 1], ("", "xx", "xxx"), ("", "", ""), [0, 0, 0]),  # no answer is no short one
        ([1, 1, 0], ("xx", "xx", "xx"), ("", "", ""), [1, 0, 0]),  # the first of equal ones
        ([0, 1, 1], ("xx", "xx", "xx"), ("", "", ""), [0, 0, 0]),
        ([1, 1, 0], ("xx", "xxx", "x"), ("yy", "y", "yyy"), [0, 1, 0]),
        ([1, 1, 0], ("x", "xxx", "xx"), ("y", "yy", "yyy"), [2, 0, 0]),
        ([np.nan, 1, 0], ("x", "xx", "xxx"), ("", "", ""), [0, 0, 0]),
    ],
)
def test_the_shortest_of_the_best_by_comparison_gains(scores, texts, thoughts, gains) -> None:
    """Three members, so the best fifth is whoever has the highest score."""
    members = [answer(1, text, thought=t) for text, t in zip(texts, thoughts, strict=True)]
    config = dataclasses.replace(PLAIN, shortest_bonus=1)
    found = shaping(members, np.array(scores, np.float32), config)
    np.testing.assert_allclose(found, gains)


def test_one_alone_is_shaped_by_nothing() -> None:
    assert shaping([answer(1, "x", thought="y")], np.array([3.0]), PLAIN).tolist() == [0]
    assert not len(shaping([], np.array([]), PLAIN))


@pytest.fixture
def server():
    """Answers with the texts of `said`, one after the other; keeps questions and headers."""
    said, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((question, self.headers))
            body = json.dumps({"choices": [{"message": {"content": said.pop(0)}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *unused: object) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}/v1", said, asked
    made.shutdown()
    made.server_close()


PAIR = answer(1, "right"), answer(0, "wrong")


def test_a_server_can_judge_and_its_silence_is_no_judgement(server, capsys) -> None:
    url, said, asked = server
    said += ["The first is right.\nA", "tie", "I cannot t\u00e9ll \x1b[2J", ["A"], 7, None]
    judge = make_judge(PreferenceConfig(judge=url, judge_model="judge"))
    assert [judge(*PAIR) for _ in range(6)] == [1.0, 0.5, None, 1.0, None, None]
    question, headers = asked[0]
    assert question["model"] == "judge" and "Authorization" not in headers
    assert "Answer B:\nwrong" in question["messages"][0]["content"]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3 and all(f"judge {url}/chat/completions: " in line for line in told)
    assert "I cannot t" in told[0] and "int" in told[1]
    assert all(line.isascii() and line.isprintable() for line in told)


def test_a_server_that_is_gone_ends_no_run(capsys) -> None:
    judge = EndpointJudge("http://127.0.0.1:1/v1", "judge", 1.0)
    assert np.isnan(preference_rewards(PAIR, PLAIN, judge)).all()
    assert capsys.readouterr().out.count("a comparison is left out") == 1  # said once


def test_a_generative_reward_model_is_asked_in_its_own_roles(server, monkeypatch) -> None:
    url, said, asked = server
    monkeypatch.setenv("KEY_OF_THE_JUDGE", "open sesame\n")
    config = PreferenceConfig(
        judge=url,
        judge_format="genrm",
        judge_principle="Be brief.",
        judge_key_variable="KEY_OF_THE_JUDGE",
    )
    said += ['```json\n{"score_1": 4, "score_2": 4, "ranking": 2}\n```', "A"]
    judge = make_judge(config)
    assert judge(answer(1, "right"), answer(0, " ")) == Comparison(4, 4, 2)
    assert judge(*PAIR) is None
    question, headers = asked[0]
    told = [(message["role"], message["content"]) for message in question["messages"]]
    assert told[:-3] == [(m["role"], m["content"]) for m in TASK.messages]
    assert told[-3:] == [
        ("principle", "Be brief."),
        ("response_1", "right"),
        ("response_2", "None"),
    ]
    assert headers["Authorization"] == "Bearer open sesame"


def test_judges_that_cannot_be_are_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"PreferenceConfig\.judge='model'"):
        PreferenceConfig(judge="model")
    with pytest.raises(ValueError, match=r"judge_principle='x': must be empty without .*genrm"):
        PreferenceConfig(judge="rules", judge_principle="x")
    config = PreferenceConfig(judge="http://h/v1", judge_key_variable="KEY_OF_THE_JUDGE")
    for value in (None, "", "two\nlines"):
        if value is None:
            monkeypatch.delenv("KEY_OF_THE_JUDGE", raising=False)
        else:
            monkeypatch.setenv("KEY_OF_THE_JUDGE", value)
        with pytest.raises(ValueError, match=r"judge_key_variable='KEY_OF_THE_JUDGE': .*export"):
            make_judge(config)
