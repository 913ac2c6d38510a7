"""Processes play as this one does; one that dies or hangs costs its episodes, and no others."""

import os
import time

import pytest

from nemotron_jax.data.messages import oracle_source
from nemotron_jax.environments.turns import Turn
from nemotron_jax.posttraining.players import Here
from nemotron_jax.posttraining.workers import Workers

ENVIRONMENT, LEVEL = oracle_source("oracle:arithmetic/1")
TASKS = [ENVIRONMENT.split(0, "train", index, level=LEVEL) for index in range(5)]


class Fragile(Here):
    """Ends or hangs at a word."""

    def reply(self, turns):
        said = {turn["content"] for turn in turns.values()}
        if "die" in said:
            os._exit(3)
        if "hang" in said:
            time.sleep(60)
        return super().reply(turns)


@pytest.fixture(scope="module")
def workers():
    made = Workers(2, timeout_s=20.0, make=Fragile)
    yield made
    made.close()


def turn_of(task, number: int) -> dict:
    turns = ENVIRONMENT.oracle(task)
    return Turn.of(turns[number]).message()


def through(players, words: dict[int, str]) -> tuple:
    """All replies and verdicts of the oracle's turns, with some first turns replaced by a word."""
    players.start(TASKS)
    heard = []
    for number in range(3):
        turns = {place: turn_of(task, number) for place, task in enumerate(TASKS)}
        if number == 0:
            turns |= {p: {"role": "assistant", "content": word} for p, word in words.items()}
        heard.append(players.reply(turns))
    return heard, players.verify()


def test_processes_play_as_this_one_does(workers) -> None:
    here = Here()
    assert through(workers, {}) == through(here, {})
    assert through(workers, {3: "no"}) == through(here, {3: "no"})
    here.close()


def test_a_worker_that_dies_or_hangs_is_replaced_and_its_episodes_do_not_count(workers) -> None:
    for word, reason in (("die", "worker ended"), ("hang", "did not answer in time")):
        before = workers.replaced
        workers._timeout_s = 3.0 if word == "hang" else 20.0
        _, verdicts = through(workers, {1: word})
        lost = [verdict.infra_error for verdict in verdicts]
        assert [reason in (why or "") for why in lost] == [False, True, False, True, False]
        assert [v.reward for v in verdicts if v.infra_error is None] == [1, 1, 1]
        assert workers.replaced == before + 1
    workers._timeout_s = 20.0
    assert [verdict.reward for verdict in through(workers, {})[1]] == [1] * 5


def test_one_that_dies_between_turns_is_noticed(workers) -> None:
    workers.start(TASKS)
    workers._workers[0]._process.kill()
    verdicts = workers.verify()
    assert [v.infra_error is None for v in verdicts] == [False, True, False, True, False]
