"""What a model of arithmetic knows beside the task that it was trained on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.environments.base import Draft, Task
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.families.arithmetic import Arithmetic, flat_sum
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.conversations import make_sampler
from nemotron_jax.posttraining.curriculum import held_out_tasks
from nemotron_jax.posttraining.success import play_tasks_once

# Numbers of an expression and the largest of them. Level 1 of arithmetic, which was trained on, has
# three to 20.
SUMS = {
    "two numbers to 20": (2, 20),
    "three numbers to 99": (3, 99),
    "three numbers to 999": (3, 999),
    "four numbers to 20": (4, 20),
}
TASKS, TRIES = 128, 8  # held-out tasks of a kind; tries at each of those that were trained on
_ROOM = 2  # such episodes take up to twice the tokens: another call, longer numbers
_NORMAL_95 = 1.96
_SEED = 2_000_003  # of draws: far from those of evaluations and pools


class Sums(Arithmetic):
    """Expressions of more, fewer and larger numbers; a level is a place in `SUMS`."""

    name = "sums"
    summary = "Work out an expression of other numbers with the calculator"
    counterpart = "none"
    levels = len(SUMS)

    def draw(self, draws: Draws, level: int) -> Draft:
        """A random problem."""
        return flat_sum(draws, *list(SUMS.values())[level])


KINDS = {
    **{name: f"experiments.carried_over:Sums/{level}" for level, name in enumerate(SUMS)},
    "brackets, four numbers to 50": "arithmetic/2",
}


def carried_over(
    model: Nemotron, tokenizer: Tokenizer, rollout: RolloutConfig, execution: Execution
) -> dict[str, Any]:
    """Success at one and at the best of eight tries on held-out tasks of the kind that was trained
    on, and at one try on other kinds, with 95 % intervals."""
    tasks = held_out_tasks(rollout, 0, TASKS)
    tried = [task for task in tasks for _ in range(TRIES)]
    rewards = _rewards(model, tokenizer, rollout, tried, execution).reshape(len(tasks), TRIES)
    found = {
        "pass_at_1": _mean(rewards.mean(axis=1)),
        f"pass_at_{TRIES}": _mean(rewards.max(axis=1)),
    }
    roomy = dataclasses.replace(
        rollout,
        max_tokens=_ROOM * rollout.max_tokens,
        max_turn_tokens=_ROOM * rollout.max_turn_tokens,
    )
    others = {}
    for name, kind in KINDS.items():
        unlike = dataclasses.replace(roomy, environments=(kind,))
        tasks = held_out_tasks(unlike, 0, TASKS)
        others[name] = _mean(_rewards(model, tokenizer, unlike, tasks, execution))
    return found | {"other_kinds": others}


def _rewards(
    model: Nemotron,
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    tasks: Sequence[Task],
    execution: Execution,
) -> np.ndarray:
    played = play_tasks_once(
        model,
        tokenizer,
        rollout,
        tasks,
        seed=_SEED,
        sampler=make_sampler(rollout),
        execution=execution,
    )
    return np.array([episode.reward for episode in played])


def _mean(values: np.ndarray) -> dict[str, Any]:
    error = _NORMAL_95 * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return {"mean": mean, "interval": [mean - error, mean + error], "n": len(values)}
