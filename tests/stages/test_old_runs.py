"""Runs that an older version stopped half-way go on; each run derives what it needs once."""

import collections
import dataclasses
import tarfile
from pathlib import Path

import jax
import pytest

from nemotron_jax import stages
from nemotron_jax.config.distill import DistillConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.stages import distill, grpo
from nemotron_jax.training import loop, prepared
from nemotron_jax.training.metrics import read_records

ONCE = {"abstract_state": 1, "to_json": 1, "check": 1}
OLD = Path(__file__).parents[1] / "data_of_old_runs"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The directory of an old run, where its text is found."""

    def unpack(name: str) -> RunDirectory:
        with tarfile.open(OLD / f"{name}.tar.xz") as file:
            file.extractall(tmp_path, filter="data")
        monkeypatch.chdir(tmp_path)
        return RunDirectory(name)

    return unpack


@pytest.fixture
def calls(monkeypatch) -> collections.Counter:
    """How often a run derives what it is enough to derive once."""
    counted: collections.Counter = collections.Counter()

    def count(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counting(*values, **options):
            counted[name] += 1
            return function(*values, **options)

        monkeypatch.setattr(owner, name, counting)

    count(prepared, "abstract_state")
    count(loop, "to_json")
    count(RunDirectory, "check")
    return counted


def train(config: RunConfig, run: RunDirectory) -> int:
    return stages.run(config, run, make_mesh(config.mesh, jax.devices()))


@pytest.mark.slow  # a train step to compile
def test_pretraining_goes_on_as_it_would_have(old, calls) -> None:
    run = old("pretrain")
    assert train(run.saved().config, run) == 0
    assert calls == ONCE
    losses = [record["loss"] for record in read_records(run.metrics)[0][2:]]
    assert losses == pytest.approx([5.899247169494629, 5.783968925476074], rel=1e-5)
    assert run.saved().step == 4


@pytest.mark.slow  # the engine's programs and a train step to compile
def test_learning_from_rewards_goes_on(old, calls) -> None:
    run = old("grpo")
    part = run.part("grpo")
    assert part.saved().step == 2 and not run.result.exists()
    assert train(part.saved().config, run) == 0
    assert calls == ONCE
    assert part.saved().step == 4 and run.result.exists()
    assert [record["step"] for record in read_records(part.metrics)[0]] == [1, 2, 3, 4]


def test_fine_tuning_that_is_finished_is_only_read(old, calls) -> None:
    part = old("grpo").part("sft")
    assert train(part.saved().config, part) == 0
    assert calls == ONCE


@pytest.mark.parametrize(("name", "stage"), [("pretrain", ""), ("grpo", "grpo")])
def test_the_state_of_a_stopped_run_is_taken_up(old, calls, monkeypatch, name, stage) -> None:
    begun = []

    def ended(run, state, step, parts):
        begun.append((step, int(state.step), parts.data.state()["step"]))
        return state, step

    monkeypatch.setattr(loop, "_train", ended)  # no step is compiled
    run = old(name)
    config = (run.part(stage) if stage else run).saved().config
    assert train(run.with_saved_schedule(config), run) == 0
    assert begun == [(2, 2, 2)] and calls == ONCE


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_new_run_derives_everything_once(old, calls, monkeypatch, stage, tmp_path) -> None:
    of_one_stage = stage in ("pretrain", "distill")
    first = old("pretrain" if of_one_stage else "grpo")
    config = (first if of_one_stage else first.part(stage)).saved().config
    if stage == "distill":
        teacher = DistillConfig(teacher=str(first.path))
        training = dataclasses.replace(config.training, mtp_depths=0)
        config = dataclasses.replace(config, stage=stage, distill=teacher, training=training)
        monkeypatch.setattr(distill.Lesson, "end", lambda *unused: "")
    if stage == "grpo":
        start = str(first.part("sft").path)
        config = dataclasses.replace(config, warm_start=None, init_from=start)
    ended = lambda run, state, step, parts: (state, run.config.training.steps)
    monkeypatch.setattr(loop, "_train", ended)  # no step is compiled
    monkeypatch.setattr(grpo, "compare", lambda *unused: None)
    assert train(config, RunDirectory("new")) == 0
    assert calls == ONCE
