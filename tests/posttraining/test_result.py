"""Before and after on the same tasks: means, intervals, and what is easy, by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nemotron_jax.data.messages import played_conversation
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Verdict
from nemotron_jax.playing.episode import Episode
from nemotron_jax.posttraining import result as results
from nemotron_jax.posttraining.result import compared, easy_tasks, result, summary
from nemotron_jax.run_directory import RunDirectory

TASKS = [registry["arithmetic"].split(0, "held_out", n, level=1) for n in range(12)]


def test_the_interval_is_that_of_the_paired_differences() -> None:
    before = np.array([0.0, 1.0, 0.0, 0.5, np.nan, 0.25])
    after = np.array([1.0, 1.0, 0.5, 0.5, 1.0, np.nan])
    found = compared(before, after)  # four pairs: gains 1, 0, 0.5, 0
    assert (found["before"], found["after"], found["n"]) == (0.375, 0.75, 4)
    deviation = np.sqrt(((1 - 0.375) ** 2 + 2 * 0.375**2 + 0.125**2) / 3)
    error = 1.96 * deviation / 2
    assert found["interval"] == pytest.approx([0.375 - error, 0.375 + error])
    shifted = compared(before, before + 0.25)  # a gain that is the same everywhere is certain
    assert shifted["interval"] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_pairs_nothing_is_certain(count) -> None:
    found = compared(np.zeros(count), np.ones(count))
    assert found["n"] == count and np.ptp(found["interval"]) == 2


def test_easy_tasks_are_those_that_the_slip_gets_right() -> None:
    easy = easy_tasks(TASKS, "left_to_right")
    assert easy.any() and not easy.all()
    for task, is_easy in zip(TASKS, easy, strict=True):
        turns = registry["arithmetic"].slips(task)["left_to_right"]
        assert (played_conversation(registry["arithmetic"], task, turns)[1] == 1) == is_easy
    assert not easy_tasks(TASKS, "no such slip").any()


def test_a_result_is_of_all_tasks_and_of_each_kind(grpo_config, monkeypatch) -> None:
    rollout = dataclasses.replace(grpo_config.rl.rollout, environments=("arithmetic/1", "lookup/0"))
    rl = dataclasses.replace(grpo_config.rl, rollout=rollout, result_tasks=10)

    def play(model: float, tokenizer, rollout, tasks, *, seed: int, **how) -> list[Episode]:
        """The model is how often it succeeds; one environment failed once."""
        draws = np.random.default_rng([seed - 1, 5]).random(len(tasks))
        verdicts = [Verdict(float(value < model)) for value in draws]
        verdicts[3] = Verdict(0.0, infra_error="gone")
        none = ((), np.zeros(0, np.float32), (), False)
        made = zip(tasks, verdicts, strict=True)
        return [Episode(task, 0, *none, verdict, ()) for task, verdict in made]

    monkeypatch.setattr(results, "play_tasks_once", play)
    found = result(0.3, 0.8, None, rl, 0, grpo_config.execution)
    assert found["n"] == 19 and found["before"] < found["after"]
    parts = found["environments"]
    assert {name: part["n"] for name, part in parts.items()} == {"arithmetic": 9, "lookup": 10}
    for moment in ("before", "after"):
        total = sum(part["n"] * part[moment] for part in parts.values())
        assert total / 19 == pytest.approx(found[moment])
        kinds = sum(found[f"{kind}_n"] * found[f"{kind}_{moment}"] for kind in ("easy", "hard"))
        assert kinds / 19 == pytest.approx(found[moment])
    lines = summary(found, RunDirectory(Path("run"))).splitlines()
    assert [line.split()[0] for line in lines] == [
        "success",
        "easy",
        "arithmetic",
        "lookup",
        "result",
    ]
