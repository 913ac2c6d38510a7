"""A run stopped and begun again is the run that was never stopped, bit for bit."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from nemotron_jax.config.precision import nemotron3_nvfp4
from nemotron_jax.config.resume import check_resumable
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.loop import TrainingStopped
from tests.training.runs import SAME, changed, comparable, small_run, train


def assert_same_model(one, other):
    ours, theirs = flatten(one), flatten(other)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), name)


def read_log(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_half_and_half_is_the_whole(finished_run, tmp_path):
    config, _, whole = finished_run
    half = train(changed(config, training={"steps": 6}), tmp_path)
    assert half.step == 6 and half.finished
    rest = train(config, tmp_path)
    assert comparable(read_log(tmp_path)) == comparable(whole.records)
    assert_same_model(rest.model, whole.model)


class Interrupted:
    """A loader that sends this process a signal when it hands out a step's batch."""

    def __init__(self, loader, at):
        self._loader, self._at = loader, at
        self.state, self.restore = loader.state, loader.restore

    def __next__(self):
        batch = next(self._loader)
        if self._loader.state()["step"] in self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


def test_sigterm_finishes_the_step_saves_and_goes_on_later(finished_run, tmp_path):
    config, _, whole = finished_run
    stopped = train(config, tmp_path, data=lambda loader: Interrupted(loader, {5}))
    assert (stopped.step, stopped.finished) == (5, False)
    assert RunDirectory(tmp_path).steps()[-1] == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    rest = train(config, tmp_path)
    assert rest.finished and comparable(read_log(tmp_path)) == comparable(whole.records)
    assert_same_model(rest.model, whole.model)


def test_records_and_samples_after_the_checkpoint_are_made_anew(finished_run, tmp_path):
    config, _, whole = finished_run
    text = lambda model: "a text\nstep 99\nwith a trap"
    train(changed(config, training={"steps": 6}), tmp_path, samples=text)
    log, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.txt"
    kept = samples.read_text()
    assert kept == "step 6\n  a text\n  step 99\n  with a trap\n"
    ahead = [dict(record, loss=0.0) for record in read_log(tmp_path)[-1:]]
    for step in (7, 8):
        log.open("a").write(json.dumps(ahead[0] | {"step": step}) + "\n")
    log.open("a").write('{"step": 9, "lo')
    samples.open("a").write("step 8\n  never kept\n")
    train(config, tmp_path, samples=text)
    assert comparable(read_log(tmp_path)) == comparable(whole.records)
    assert samples.read_text() == kept + kept.replace("step 6", "step 12")


def test_a_finished_run_begun_again_changes_nothing(finished_run):
    config, directory, whole = finished_run
    before = (directory / "metrics.jsonl").read_bytes()
    again = train(config, directory)
    assert again.finished and again.step == 12
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert_same_model(again.model, whole.model)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"seed": 3}, "seed=3, was 0"),
        ({"model": {"width": 64}}, "model.width=64, was 32"),
        ({"data": {"batch_size": 8}}, "data.batch_size=8, was 4"),
        ({"training": {"aux_loss_scale": 0.5}}, "training.aux_loss_scale=0.5, was 0.0001"),
        ({"execution": {"compute_dtype": "bfloat16"}}, "execution.compute_dtype='bfloat16'"),
        ({"model": {"mtp": None}, "training": {"mtp_depths": 0}}, "training.mtp_depths=0, was 2"),
    ],
)
def test_another_run_is_refused_by_the_names_of_its_fields(finished_run, parts, named):
    config, directory, _ = finished_run
    seed = parts.get("seed", 0)
    nested = {name: fields for name, fields in parts.items() if name != "seed"}
    other = dataclasses.replace(changed(config, **nested), seed=seed)
    before = (directory / "config.json").read_bytes()
    with pytest.raises(ValueError, match=named) as error:
        train(other, directory)
    assert "start in a new directory" in str(error.value)
    assert (directory / "config.json").read_bytes() == before


def test_what_changes_no_mathematics_may_change(texts):
    config = small_run(texts)
    free = changed(
        config,
        training={"steps": 99, "micro_batches": 2, "loss_chunk": 32, "max_skipped_steps": 3},
        logging={"log_every": 7, "keep_checkpoints": 9, "evaluate_rows": 2},
        data={"prefetch": 1},
        execution={"remat": "full", "layers": "unrolled", "kernels": "xla"},
    )
    check_resumable(config, free, "run")


def test_a_judge_may_move_but_not_change(texts):
    def run(judge: str, model: str, transcripts: int = 16):
        config = small_run(texts)
        preference = dataclasses.replace(config.rl.preference, judge=judge, judge_model=model)
        return changed(config, rl={"preference": preference, "transcripts": transcripts})

    before = run("http://a:1/v1", "m")
    check_resumable(before, run("https://b/v1", "m", transcripts=2), "run")
    with pytest.raises(ValueError, match="judge='rules', was"):
        check_resumable(before, run("rules", "m"), "run")
    with pytest.raises(ValueError, match="judge_model='other', was 'm'"):
        check_resumable(before, run("http://a:1/v1", "other"), "run")


class Spoiled:
    """A loader whose batches from some step on give no finite loss."""

    def __init__(self, loader, steps):
        self._loader, self._steps = loader, steps
        self.state, self.restore = loader.state, loader.restore

    def __next__(self):
        batch = next(self._loader)
        if self._loader.state()["step"] in self._steps:
            spoil = np.full_like(batch.weights, np.nan)
            return dataclasses.replace(batch, weights=spoil)
        return batch


def test_steps_that_are_not_finite_are_skipped_and_counted(finished_run, tmp_path):
    config, _, whole = finished_run
    outcome = train(config, tmp_path, data=lambda loader: Spoiled(loader, {4, 5}))
    skipped = [record["skipped"] for record in outcome.records]
    assert skipped == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2]
    assert outcome.records[3]["loss"] is None  # JSON has no NaN
    assert comparable(outcome.records[:3]) == comparable(whole.records[:3])
    assert all(np.isfinite(leaf).all() for leaf in flatten(outcome.model).values())


def test_too_many_of_them_stop_the_run_and_keep_the_last_checkpoint(texts, tmp_path):
    config = changed(small_run(texts, log_every=2), training={"max_skipped_steps": 3})
    spoil = lambda loader: Spoiled(loader, set(range(4, 99)))
    with pytest.raises(TrainingStopped, match="step 6: the last 3 steps.*peak_learning_rate"):
        train(config, tmp_path, data=spoil)
    assert RunDirectory(tmp_path).steps() == [3]
    assert train(config, tmp_path).finished


@pytest.mark.slow
def test_a_quantised_run_resumes_as_one_never_stopped(texts, tmp_path):
    """Random rounding follows the seed and the step, not the session."""
    base = small_run(texts)
    recipe = nemotron3_nvfp4(num_last_layers_high=1)
    config = changed(base, execution={"precision": recipe}, training={"steps": 6})
    whole = train(config, tmp_path / "whole")
    train(changed(config, training={"steps": 3}), tmp_path / "parts")
    parts = train(config, tmp_path / "parts")
    same = lambda outcome: [{name: r[name] for name in SAME} for r in outcome.records]
    assert same(parts) == same(whole)
    plain = train(changed(base, training={"steps": 1}), tmp_path / "plain")
    assert plain.records[0]["loss"] != whole.records[0]["loss"]


def test_formats_switch_at_their_step(texts, tmp_path, monkeypatch):
    from nemotron_jax.training import prepared

    compiled = []
    objective = prepared.pretrain_objective

    def keep(training, execution):
        compiled.append(execution.precision)
        return objective(training, execution)

    monkeypatch.setattr(prepared, "pretrain_objective", keep)
    recipe = dataclasses.replace(nemotron3_nvfp4(num_last_layers_high=1), switch_step=2)
    config = changed(
        small_run(texts),
        model={"pattern": "ME", "mtp": None},  # of which the first layer changes its format
        execution={"precision": recipe},
        training={"steps": 4, "mtp_depths": 0},
    )
    outcome = train(config, tmp_path)
    assert outcome.finished and outcome.records[1]["loss"] != outcome.records[2]["loss"]
    before, after = recipe.at_step(0), recipe.at_step(2)
    assert compiled == [before, after] and before != after


def test_the_step_compiles_once(finished_run, tmp_path, monkeypatch):
    from nemotron_jax.training import loop

    # A step compiled ahead raises where another shape or placement would compile again.
    compiled = []
    compile_step = loop.compile_train_step

    def count(*values):
        compiled.append(compile_step(*values))
        return compiled[-1]

    monkeypatch.setattr(loop, "compile_train_step", count)
    config = finished_run[0]
    train(changed(config, training={"steps": 3}), tmp_path)
    train(changed(config, training={"steps": 6}), tmp_path)
    assert [type(step) for step in compiled] == [jax.stages.Compiled] * 2
    jax.clear_caches()
