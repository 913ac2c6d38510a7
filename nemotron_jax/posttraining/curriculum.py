"""Which tasks are played when: shares of environments, a difficulty filter, easy ones first."""

import dataclasses
import hashlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nemotron_jax.config.rl import RLConfig, RolloutConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.json_lines import keep_damaged, read_objects
from nemotron_jax.environments.base import Environment, Task
from nemotron_jax.environments.catalogue import task_source
from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import RunDirectory

# Task numbers of each environment, by its name in the config, in the order of being played.
Pools = Mapping[str, Sequence[int]]
# Rewards of tasks, NaN where unknown, by the number of the play and that of the first task.
PoolPlays = Callable[[Sequence[Task], int, int], Sequence[float]]

_TELL_EVERY_S = 10.0  # between lines about plays, of which there may be hours

# Keeps the tasks of episodes apart from those that fine-tuning with the same seed has seen.
_TASK_SEED = 1_000_003
# Multiples of it, modulo 1, are spread evenly however many one takes: so shares are kept at any
# point of a run, without a random draw.
_GOLDEN = (5**0.5 - 1) / 2


def played_environments(config: RolloutConfig) -> list[tuple[Environment, int | None]]:
    """The environments and levels that the config names; ValueError for one that is not there."""
    return [_source(name) for name in config.environments]


def _source(name: str) -> tuple[Environment, int | None]:
    return task_source(name, f"rl.rollout.environments={name!r}")


def training_task(name: str, seed: int, index: int) -> Task:
    """Training task `index` of an environment that a config names."""
    environment, level = _source(name)
    return environment.split(seed + _TASK_SEED, "train", index, level=level)


def step_seed(seed: int, number: int) -> int:
    """The seed of the draws of a step's episodes, below 2**31."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1


def held_out_tasks(config: RolloutConfig, seed: int, count: int) -> list[Task]:
    """The first `count` held-out tasks of each environment of a run."""
    return [
        environment.split(seed, "held_out", index, level=level)
        for environment, level in played_environments(config)
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
    drawn = np.random.default_rng([seed, number, 1]).random(config.prompts)
    low_effort = drawn < low_effort_chances(config)[chosen[first:]]
    tasks = []
    for prompt in range(first, first + config.prompts):
        name = config.environments[chosen[prompt]]
        index = int(np.count_nonzero(chosen[:prompt] == chosen[prompt]))
        if pools is not None:
            index = pools[name][index % len(pools[name])]
        tasks.append(training_task(name, seed, index))
    return tasks, low_effort.tolist()


def low_effort_chances(config: RolloutConfig) -> Float[np.ndarray, "N"]:
    """How likely a prompt of each of the config's environments asks for low effort: 0 but in those
    that are to, whose prompts make up the share that the config has of all."""
    names = [environment.name for environment, _ in played_environments(config)]
    asks = np.isin(names, config.low_effort_environments)
    share = _shares(config)[asks].sum()
    return asks * min(1.0, config.low_effort / share) if share else np.zeros(len(names))


def _shares(config: RolloutConfig) -> Float[np.ndarray, "N"]:
    """The share of prompts of each of the config's environments."""
    shares = np.array(config.shares or [1.0] * len(config.environments))
    return shares / shares.sum()


def _environment_of_prompts(config: RolloutConfig, count: int) -> Int[np.ndarray, "N"]:
    """The environment's place in the config of each of the first `count` prompts of a run.

    Along a sequence of low discrepancy, every stretch of which holds them by their shares.
    """
    shares = _shares(config)
    bounds = np.cumsum(shares)
    points = (np.arange(count) + 0.5) * _GOLDEN % 1.0
    return np.minimum(np.searchsorted(bounds, points, side="right"), len(shares) - 1)


def make_pools(
    rl: RLConfig, seed: int, play: PoolPlays, directory: RunDirectory, *, of: str
) -> Pools | None:
    """Each environment's pool: its tasks but those that the model always solves, easiest first.

    The pools are kept in a file, since a run that goes on has another model by then, and so are the
    plays that they come from, batch by batch: what a kill or damage leaves of them is not played
    again. None where the config wants none; an environment whose tasks are all solved keeps them.
    `of` are the run's `pool_settings`: what was played under others is played again.
    """
    if not rl.pool_tasks:
        return None
    names, count = rl.rollout.environments, rl.pool_tasks
    if (kept := _read_pools(directory.pools, directory.pool_plays, of)) is not None:
        return kept
    tasks = [training_task(name, seed, n) for name in names for n in range(count)]
    rewards = _played(rl, tasks, play, directory.pool_plays, of)
    counts = np.sum(~np.isnan(rewards), axis=0)
    means = np.where(counts, np.nansum(rewards, axis=0) / np.maximum(counts, 1), np.nan)
    found = dict(zip(names, means.reshape(len(names), count), strict=True))
    values = {
        "pools": {name: pool(rates) for name, rates in found.items()},
        "always_solved": {name: float(np.mean(rates == 1)) for name, rates in found.items()},
        "unknown": {name: float(np.mean(np.isnan(rates))) for name, rates in found.items()},
    }
    with atomic_writer(directory.pools) as out:
        out.write(json.dumps(_signed(values | {"of": of})).encode())
    return values["pools"]


def _read_pools(path: Path, plays: Path, of: str) -> Pools | None:
    """The pools of a file; None where there is none, or, with a warning, where it does not hold
    those of this run as they were written."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and found.get("of") == of and _is_signed(found):
        return found["pools"]
    kind = "is of other settings" if _is_signed(found) else "is damaged"
    warnings.warn(f"{path}: {kind}; it is made again of {plays.name}", stacklevel=3)
    return None


def _played(
    rl: RLConfig, tasks: Sequence[Task], play: PoolPlays, path: Path, of: str
) -> Float[np.ndarray, "S N"]:
    """The reward of each play of each task, NaN where its environment failed.

    A batch is a line of the file as soon as it is played; those that are there are not played.
    """
    size = rl.rollout.prompts * rl.rollout.generations
    rewards = np.full((rl.pool_samples, len(tasks)), np.nan)
    lines = [(number, _of_line(found)) for number, found in read_objects(path)]
    if damaged := [number for number, line in lines if line is None]:
        keep_damaged(path, damaged)
    kept = [line for _, line in lines if line is not None and line["of"] == of]
    with atomic_writer(path) as out:
        out.writelines((json.dumps(line) + "\n").encode() for line in kept)
    known = {(line["draw"], line["first"]): line["rewards"] for line in kept}
    began = time.monotonic()
    with path.open("a", encoding="utf-8") as out:
        for draw, first in itertools.product(range(len(rewards)), range(0, len(tasks), size)):
            part = tasks[first : first + size]
            values = known.get((draw, first))
            if values is None:
                values = [None if math.isnan(v) else v for v in play(part, draw, first)]
                line = {"of": of, "draw": draw, "first": first, "rewards": values}
                out.write(json.dumps(_signed(line)) + "\n")
                out.flush()
                if time.monotonic() - began > _TELL_EVERY_S:
                    began, done = time.monotonic(), draw * len(tasks) + first + len(part)
                    print(f"pools: {done:,} of {rewards.size:,} plays", flush=True)
            rewards[draw, first : first + size] = np.array(values, float)
    return rewards


def pool_settings(config: RunConfig) -> str:
    """What the plays of pools are a function of, the start of the model with it, as one name."""
    rollout = dataclasses.replace(
        config.rl.rollout, workers=0, worker_kind="processes", timeout_s=1.0
    )
    rl = RLConfig(
        rollout=rollout, pool_tasks=config.rl.pool_tasks, pool_samples=config.rl.pool_samples
    )
    parts = (config.model, config.execution, config.warm_start, config.sft, rl)
    values = [None if part is None else dataclasses.asdict(part) for part in parts]
    return _digest([*values, config.seed, config.init_from])


def _of_line(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """A line of the plays, unless it is damaged."""
    return found if found is not None and _is_signed(found) else None


def _signed(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"sha256": _digest(values)}


def _is_signed(values: Any) -> bool:
    """Whether values are those that were written, to the last digit."""
    if not isinstance(values, dict) or "sha256" not in values:
        return False
    try:
        return values["sha256"] == _digest({k: v for k, v in values.items() if k != "sha256"})
    except (ValueError, RecursionError):
        return False


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
