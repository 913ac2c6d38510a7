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
from nemotron_jax.posttraining.rollout import Episode, TurnSpan

TASK = registry["arithmetic"].split(0, "train", 0)
PLAIN = PreferenceConfig(judge="rules", reasoning_weight=0, answer_weight=0, style_weight=0)


def answer(
    reward: float, text: str = "", group: int = 0, infra: str | None = None, thought: str = ""
) -> Episode:
    message = {"role": "assistant", "content": text, "reasoning_content": thought}
    turns = (TurnSpan(0, 1, True, 0, True),)
    verdict = Verdict(reward, infra_error=infra)
    return Episode(TASK, group, (1,), np.zeros(1, np.float32), turns, False, verdict, (message,))


def test_each_is_compared_with_its_neighbours() -> None:
    members = [answer(reward) for reward in (0.9, 0.1, 0.5, 0.5)]
    # 0.9 beats 0.1 and 0.5; 0.1 loses twice; the first 0.5 beats 0.1 and ties; the second ties.
    np.testing.assert_allclose(preference_rewards(members, PLAIN, rule_judge), [1, 0, 0.75, 0.25])
    assert preference_rewards(members[:2], PLAIN, rule_judge).tolist() == [1, 0]
    assert preference_rewards(members[:1], PLAIN, rule_judge).tolist() == [0.5]
    assert ring(5) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
    assert ring(2) == [(0, 1)] and not ring(1) and not ring(0)
    # Of four comparisons two were judged.
    found = ring_scores([1.0, None, 0.25, None], 4)
    np.testing.assert_allclose(found, [1, 0, 0.25, 0.75])
    assert np.isnan(ring_scores([None, 1.0, None, None], 4)).tolist() == [True, False, False, True]


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
    np.testing.assert_allclose(found, [1, 0, 0, 1, 0.5, np.nan])
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
        ([1, 1, 0], ("xx", "xx", "xx"), ("", "", ""), [0, 0, 0]),
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


def test_a_server_can_judge_and_its_silence_is_no_judgement() -> None:
    said = ["The first is right.\nA", "tie", "I cannot tell"]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (
                asked["model"] == "judge" and "Answer B:\nwrong" in asked["messages"][0]["content"]
            )
            body = json.dumps({"choices": [{"message": {"content": said.pop(0)}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *unused: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    judge = make_judge(PreferenceConfig(judge=url, judge_model="judge"))
    pair = answer(1, "right"), answer(0, "wrong")
    assert [judge(*pair) for _ in range(3)] == [1.0, 0.5, None]
    server.shutdown()
    server.server_close()
    assert EndpointJudge(url, "judge", 1.0)(*pair) is None


def test_only_rules_or_an_address_judge() -> None:
    with pytest.raises(ValueError, match=r"PreferenceConfig\.judge='model'"):
        PreferenceConfig(judge="model")
