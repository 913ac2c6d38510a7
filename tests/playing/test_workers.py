"""Workers play as this process does; one that dies or hangs costs its episodes, and no others."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.data.messages import oracle_source
from nemotron_jax.environments.catalogue import task_source
from nemotron_jax.environments.sandbox import runner
from nemotron_jax.environments.turns import Turn
from nemotron_jax.playing.players import Here
from nemotron_jax.playing.ray_workers import RayWorker
from nemotron_jax.playing.workers import Workers, make_players

ENVIRONMENT, LEVEL = oracle_source("oracle:arithmetic/1")
TASKS = [ENVIRONMENT.split(0, "train", index, level=LEVEL) for index in range(5)]
PATIENCE_S = 60.0  # a worker that begins imports the environments, on a machine that may be busy


class Fragile(Here):
    """Ends or hangs at a word."""

    def reply(self, turns):
        said = {turn["content"] for turn in turns.values()}
        if "die" in said:
            os._exit(3)
        if "hang" in said:
            time.sleep(60)
        time.sleep(0.5 * ("slow" in said))
        return super().reply(turns)


@pytest.fixture(scope="module", params=["processes", pytest.param("ray", marks=pytest.mark.slow)])
def workers(request):
    if request.param == "processes":
        made = Workers(2, PATIENCE_S, make=Fragile)
    else:
        ray = pytest.importorskip("ray")
        made = Workers(2, PATIENCE_S, make=Fragile, begin=RayWorker)
        request.addfinalizer(ray.shutdown)
    yield made
    made.close()


def turn_of(task, number: int) -> dict:
    turns = ENVIRONMENT.oracle(task)
    return Turn.of(turns[number]).message()


def through(players, words: dict[int, str], patience_s: float = PATIENCE_S) -> tuple:
    """All replies and verdicts of the oracle's turns, with some first turns replaced by a word.

    Workers that start anew have their time; turns have `patience_s`.
    """
    players.start(TASKS)
    heard = []
    players._timeout_s = patience_s
    for number in range(3):
        turns = {place: turn_of(task, number) for place, task in enumerate(TASKS)}
        if number == 0:
            turns |= {p: {"role": "assistant", "content": word} for p, word in words.items()}
        heard.append(players.reply(turns))
    players._timeout_s = PATIENCE_S
    return heard, players.verify()


def test_processes_play_as_this_one_does(workers) -> None:
    here = Here()
    assert through(workers, {}) == through(here, {})
    assert through(workers, {3: "no"}) == through(here, {3: "no"})
    here.close()


def test_a_worker_that_dies_or_hangs_is_replaced_and_its_episodes_do_not_count(workers) -> None:
    for word, reason in (("die", "worker ended"), ("hang", "did not answer in time")):
        before = workers.replaced
        _, verdicts = through(workers, {1: word}, 2.0 if word == "hang" else PATIENCE_S)
        lost = [verdict.infra_error for verdict in verdicts]
        # Place 3 lives with the same worker, and was not running.
        assert [reason in (why or "") for why in lost] == [False, True, False, False, False]
        assert [v.reward for v in verdicts if v.infra_error is None] == [1, 1, 1, 1]
        assert workers.replaced == before + 1
    assert [verdict.reward for verdict in through(workers, {})[1]] == [1] * 5


def test_slow_sessions_of_one_worker_do_not_add_up(workers) -> None:
    """Each has its time, and what they take together is no sign of a worker that hangs."""
    before = workers.replaced
    through(workers, {})
    _, verdicts = through(workers, dict.fromkeys((0, 2, 4), "slow"), 0.9)
    assert [(v.reward, v.infra_error) for v in verdicts] == [(n % 2, None) for n in range(5)]
    assert workers.replaced == before


def test_sessions_of_one_that_dies_between_turns_go_on_in_another(workers) -> None:
    workers.start(TASKS)
    before = workers.replaced
    for number in range(3):
        workers.reply({place: turn_of(task, number) for place, task in enumerate(TASKS)})
        if number == 1:
            first = workers._workers[0]
            first.end() if isinstance(first, RayWorker) else first._process.kill()
    lost = [verdict for verdict in workers.verify() if verdict.infra_error]
    assert len(lost) == isinstance(first, RayWorker)  # an actor does not say what it was at
    assert workers.replaced == before + 1


def test_an_environment_of_ones_own_is_known_to_workers(workers, tmp_path, monkeypatch) -> None:
    """By a class beside the config, and by an object that the config registered."""
    (tmp_path / "own_of_workers.py").write_text(
        "from nemotron_jax.environments.families.arithmetic import Arithmetic\n"
        "class Own(Arithmetic):\n    name = 'own_of_workers'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own, level = task_source("own_of_workers:Own/1", "")
    tasks = [own.split(0, "train", index, level=level) for index in range(3)]
    workers.start(tasks)
    for number in range(3):
        workers.reply({place: turn_of(task, number) for place, task in enumerate(tasks)})
    assert [(v.reward, v.infra_error) for v in workers.verify()] == [(1, None)] * 3


def test_each_process_has_its_part_of_the_memory() -> None:
    made = []
    for count in (1, 7):
        workers = Workers(count, PATIENCE_S, begin=lambda make: made.append(make) or Unused())
        parts = [make.parts for make in made[-count:]] + [runner._parts]
        assert sum(1 / part for part in parts) <= 1
        workers.close()
    assert runner._parts == 1


class Unused:
    def end(self) -> None:
        pass


def test_signals_that_stop_a_run_stop_no_worker() -> None:
    """Ctrl-C reaches workers from their first moment on; what they are given is still played."""
    made = Workers(1, PATIENCE_S, make=Fragile)
    process = made._workers[0]._process
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    here = Here()
    assert through(made, {}) == through(here, {})
    os.kill(process.pid, signal.SIGTERM)
    assert through(made, {}) == through(here, {}) and made.replaced == 0
    made.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()  # here none is held back


def test_a_run_that_fails_does_not_wait_for_its_workers() -> None:
    code = (
        "from nemotron_jax.playing.workers import Workers\n"
        "made = Workers(1, 60.0)\n"
        "made.start([])\n"
        "made._workers[0].ask([('verify', None)])\n"
        "made._workers[0].answer(60.0)"  # answered: it is there
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_a_config_names_its_workers(monkeypatch) -> None:
    assert isinstance(make_players(RolloutConfig()), Here)
    with pytest.raises(ValueError, match=r"worker_kind='threads'"):
        RolloutConfig(worker_kind="threads")
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"worker_kind='ray': .* is not installed; pip install"):
        make_players(RolloutConfig(workers=1, worker_kind="ray"))
