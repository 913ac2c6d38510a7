"""Pools hold what the plays say, and no play is made twice, whatever happens to their files."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest

from nemotron_jax.config.run import RunConfig
from nemotron_jax.posttraining.curriculum import (
    make_pools,
    pool,
    pool_settings,
    step_tasks,
    training_task,
)
from nemotron_jax.run_directory import RunDirectory

NAMES = ("arithmetic/0", "lookup/0")


@pytest.fixture
def config(grpo_config) -> RunConfig:
    """Three tasks of each of two environments, played twice in batches of four."""
    rollout = dataclasses.replace(
        grpo_config.rl.rollout, environments=NAMES, prompts=2, generations=2
    )
    rl = dataclasses.replace(grpo_config.rl, rollout=rollout, pool_tasks=3, pool_samples=2)
    return dataclasses.replace(grpo_config, rl=rl)


class Plays:
    """Plays that earn by rates, and by the parity of the play; it may be killed."""

    rates = {"arithmetic": [1, 0.2, 0.6], "lookup": [0, 1, math.nan]}

    def __init__(self, killed_after: int = 99) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.left = killed_after

    def __call__(self, tasks, draw, first) -> list[float]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.append((draw, first, len(tasks)))
        return [self.rates[task.environment][task.index] for task in tasks]


def pools_of(config, play, path):
    """The pools of a run in a directory."""
    of = pool_settings(config)
    return make_pools(config.rl, config.seed, play, RunDirectory(path), of=of)


WHOLE = {"arithmetic/0": [2, 1], "lookup/0": [2, 0]}
ALL = [(0, 0, 4), (0, 4, 2), (1, 0, 4), (1, 4, 2)]


def test_pools_drop_what_is_always_solved_and_begin_with_the_easy(grpo_config, tmp_path) -> None:
    assert pool([0.5, 1, 0, 0.75]) == [3, 0, 2]
    assert pool([1, 1]) == [0, 1]
    # Of the third nothing is known: it is no hard one, and stays.
    assert pool([0.9, 0.2, np.nan, 1, 0]) == [0, 2, 1, 4]
    assert pool([np.nan, np.nan]) == [0, 1] and pool([1, np.nan]) == [0, 1]


def test_pools_are_made_once_and_played_in_turn(config, tmp_path) -> None:
    plays = Plays()
    assert pools_of(config, plays, tmp_path) == WHOLE and plays.asked == ALL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pools_of(config, None, tmp_path) == WHOLE
    rollout = dataclasses.replace(config.rl.rollout, prompts=4)
    tasks = step_tasks(rollout, 0, 0, WHOLE)[0] + step_tasks(rollout, 0, 1, WHOLE)[0]
    played = [task.index for task in tasks if task.environment == "arithmetic"]
    assert played[:4] == [2, 1, 2, 1]
    assert tasks[0].id == training_task(NAMES[0], 0, tasks[0].index).id or tasks[0].index == 0


def test_a_task_is_as_hard_as_the_plays_that_count_say(config, tmp_path) -> None:
    def play(tasks, draw, first):
        failed = lambda task: task.environment == "lookup" or (draw, task.index) == (0, 1)
        return [math.nan if failed(task) else task.index / 4 for task in tasks]

    assert pools_of(config, play, tmp_path) == {
        NAMES[0]: [2, 1, 0],
        NAMES[1]: [0, 1, 2],
    }
    found = json.loads((tmp_path / "pools.json").read_text())
    assert found["unknown"] == {NAMES[0]: 0, NAMES[1]: 1}


@pytest.mark.parametrize("done", range(4))
def test_a_kill_costs_no_play_that_was_made(config, tmp_path, done) -> None:
    first, second = Plays(done), Plays()
    with pytest.raises(KeyboardInterrupt):
        pools_of(config, first, tmp_path)
    with (tmp_path / "pools.jsonl").open("a") as out:
        out.write('{"of": "cut sh')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pools_of(config, second, tmp_path) == WHOLE
    assert first.asked + second.asked == ALL


def test_plays_under_other_settings_are_made_again(config, tmp_path) -> None:
    pools_of(config, Plays(), tmp_path)
    for other in (
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, rl=dataclasses.replace(config.rl, pool_tasks=2)),
    ):
        plays = Plays()
        with pytest.warns(UserWarning, match=r"pools.json: is of other settings; it is made again"):
            pools_of(other, plays, tmp_path)
        assert len(plays.asked) == 2 * -(-2 * other.rl.pool_tasks // 4)
    workers = dataclasses.replace(config.rl.rollout, workers=3)
    same = dataclasses.replace(other, rl=dataclasses.replace(other.rl, rollout=workers))
    assert pools_of(same, None, tmp_path)


DAMAGE = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:30],
    "a list": lambda text: b"[]",
    "null": lambda text: b"null",
    "no key": lambda text: b"{}",
    "deep": lambda text: b"[" * 100_000,
    "no UTF-8": lambda text: b"\xff\xfe",
    "a flipped digit": lambda text: text.replace(b"[2, 1]", b"[2, 0]"),
    "a task that is not there": lambda text: text.replace(b"[2, 1]", b"[2, -1]"),
    "an empty pool": lambda text: text.replace(b"[2, 1]", b"[]"),
    "another environment": lambda text: text.replace(b'"lookup/0"', b'"needle/0"'),
    "a deep value": lambda text: text.replace(b"[2, 1]", b"[" * 900 + b"]" * 900),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_pools_are_made_again_of_the_plays(config, tmp_path, kind) -> None:
    pools_of(config, Plays(), tmp_path)
    file = tmp_path / "pools.json"
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[kind](whole))
    assert file.read_bytes() != whole
    with pytest.warns(UserWarning, match=r"pools.json: is damaged; it is made again"):
        assert pools_of(config, None, tmp_path) == WHOLE
    assert file.read_bytes() == whole


def test_damaged_plays_alone_are_made_again(config, tmp_path) -> None:
    pools_of(config, Plays(), tmp_path)
    (tmp_path / "pools.json").unlink()
    file, plays = tmp_path / "pools.jsonl", Plays()
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"1, null]", b"0, null]")
    lines[2] = b"[" * 100_000
    file.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=r"lines 2, 3 are damaged"):
        assert pools_of(config, plays, tmp_path) == WHOLE
    assert plays.asked == ALL[1:3]
