"""Held-out tasks are played as a model writes: right turns succeed, wrong or broken ones fail."""

import dataclasses

import pytest

from configs import sft_tiny
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.messages import oracle_conversation, oracle_source
from nemotron_jax.environments.base import Verdict
from nemotron_jax.posttraining import success
from tests.playing.test_rollout import Scripted, own_turns

SOURCE = "oracle:arithmetic/1"


@pytest.fixture
def config() -> RunConfig:
    config = from_config_dict(RunConfig, sft_tiny.get_config())
    data = dataclasses.replace(config.data, sources=(SOURCE,))
    four = dataclasses.replace(config.sft, success_tasks=4)
    return dataclasses.replace(config, data=data, sft=four)


def test_success_is_the_mean_over_held_out_tasks_played_greedily(
    phrases, config, monkeypatch
) -> None:
    environment, level = oracle_source(SOURCE)
    tasks = [environment.split(config.seed, "held_out", n, level=level) for n in range(6)]
    scripts = [own_turns(phrases, oracle_conversation(environment, task)) for task in tasks]
    scripts[1] = [phrases.encode("I do not know")]
    sampler = Scripted([*scripts[:4], *scripts[4:], scripts[4], scripts[4]])
    asked = []

    def begin(model, prompts, copies, wanted, execution):
        asked.append((len(prompts), wanted.temperature, execution))
        sampler.turn, sampler.scripts = 0, sampler.scripts[4 * (len(asked) == 2) :]
        sampler.heard = [[] for _ in prompts]
        return sampler(model, prompts, copies, wanted, execution)

    monkeypatch.setattr(success, "SideBySide", lambda max_tokens: begin)
    monkeypatch.setattr(success, "_SIDE_BY_SIDE", 4)
    six = dataclasses.replace(config.sft, success_tasks=6)
    evaluate = success.success_of_oracles(phrases, config.data, six, config.seed)
    assert evaluate(None, config.execution) == {"success": pytest.approx(5 / 6)}
    assert asked == [(4, 0.0, config.execution)] * 2  # the last are filled up: one shape
    silent = dataclasses.replace(config.sft, success_tasks=0)
    assert success.success_of_oracles(phrases, config.data, silent, config.seed) is None


def test_success_is_that_of_the_plays_that_count(phrases, config, monkeypatch) -> None:
    verdicts = [Verdict(1.0), Verdict(0.0), Verdict(0.0, infra_error="gone")]

    @dataclasses.dataclass
    class Played:
        verdict: Verdict
        counted = property(lambda self: self.verdict.infra_error is None)

    monkeypatch.setattr(
        success, "play_episodes", lambda *given, **how: [Played(one) for one in verdicts]
    )
    evaluate = success.success_of_oracles(phrases, config.data, config.sft, config.seed)
    assert evaluate(None, config.execution) == {"success": 0.5}
    del verdicts[:2]
    assert evaluate(None, config.execution) == {"success": 0.0}
