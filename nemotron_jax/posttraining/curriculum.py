"""Which tasks are played when: shares of environments, a difficulty filter, easy ones first."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.atomic import atomic_writer
from nemotron_jax.data.messages import oracle_source
from nemotron_jax.environments.base import Environment, Task

# Task numbers of each environment, by its name in the config, in the order of being played.
Pools = Mapping[str, Sequence[int]]
Success = Callable[[Sequence[Task]], Sequence[float]]

# Keeps the tasks of episodes apart from those that fine-tuning with the same seed has seen.
_TASK_SEED = 1_000_003
_GOLDEN = (5**0.5 - 1) / 2


def played_environments(config: RolloutConfig) -> list[tuple[Environment, int | None]]:
    """The environments and levels that the config names; ValueError for one that is not there."""
    return [oracle_source(name) for name in config.environments]


def training_task(name: str, seed: int, index: int) -> Task:
    """Training task `index` of an environment that a config names."""
    environment, level = oracle_source(name)
    return environment.split(seed + _TASK_SEED, "train", index, level=level)


def held_out_tasks(config: RunConfig, count: int) -> list[Task]:
    """The first `count` held-out tasks of each environment of a run."""
    return [
        environment.split(config.seed, "held_out", index, level=level)
        for environment, level in played_environments(config.rl.rollout)
        for index in range(count)
    ]


def step_tasks(
    config: RolloutConfig, seed: int, number: int, pools: Pools | None = None
) -> tuple[list[Task], list[bool]]:
    """The tasks of batch `number`, and which of their prompts ask for low effort.

    A function of its arguments alone. An environment's tasks come one after the other, those of its
    pool over and over, without pools each once; every batch holds the environments by their shares,
    but for rounding.
    """
    first = number * config.prompts
    chosen = _environment_of_prompts(config, first + config.prompts)
    generator = np.random.default_rng([seed, number, 1])
    low_effort = generator.random(config.prompts) < config.low_effort
    tasks = []
    for prompt in range(first, first + config.prompts):
        name = config.environments[chosen[prompt]]
        index = int(np.count_nonzero(chosen[:prompt] == chosen[prompt]))
        if pools is not None:
            index = pools[name][index % len(pools[name])]
        tasks.append(training_task(name, seed, index))
    return tasks, low_effort.tolist()


def _environment_of_prompts(config: RolloutConfig, count: int) -> Int[np.ndarray, "N"]:
    """The environment's place in the config of each of the first `count` prompts of a run.

    Along a sequence of low discrepancy, every stretch of which holds them by their shares.
    """
    shares = np.array(config.shares or [1.0] * len(config.environments))
    bounds = np.cumsum(shares) / shares.sum()
    points = (np.arange(count) + 0.5) * _GOLDEN % 1.0
    return np.minimum(np.searchsorted(bounds, points, side="right"), len(shares) - 1)


def make_pools(config: RunConfig, success: Success, path: Path) -> Pools | None:
    """Each environment's pool: its tasks but those that the model always solves, easiest first.

    `success` gives the share of plays that solve each of some tasks, NaN where that is unknown. The
    pools are kept in a file, since a run that goes on has another model by then. None where the
    config wants none; an environment whose tasks are all solved keeps them all.
    """
    if not config.rl.pool_tasks:
        return None
    if path.exists():
        return json.loads(path.read_text("utf-8"))["pools"]
    names, count = config.rl.rollout.environments, config.rl.pool_tasks
    tasks = [training_task(name, config.seed, n) for name in names for n in range(count)]
    found = np.asarray(success(tasks)).reshape(len(names), count)
    pools = {name: pool(rates) for name, rates in zip(names, found, strict=True)}
    share = lambda of: {name: float(np.mean(of(r))) for name, r in zip(names, found, strict=True)}
    shares = {"always_solved": share(lambda rates: rates == 1), "unknown": share(np.isnan)}
    with atomic_writer(path) as out:
        out.write(json.dumps({"pools": pools, **shares}).encode())
    return pools


def pool(rates: Sequence[float]) -> list[int]:
    """The numbers of tasks by falling success, without those that always succeed.

    A task of unknown success (NaN) stays, among those of the mean. All of them stay where no task
    is known to fail: a pool of unknown ones alone might be one that cannot be played.
    """
    known = [rate for rate in rates if not math.isnan(rate)]
    middle = sum(known) / len(known) if known else 0.0
    order = sorted(range(len(rates)), key=lambda n: -(middle if math.isnan(rates[n]) else rates[n]))
    useful = any(rate < 1 for rate in known)
    return [n for n in order if not (useful and rates[n] >= 1)]
