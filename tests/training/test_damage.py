"""Runs whose directory was damaged or asked for wrongly go on, or say what is wrong."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.convert import from_config_dict, to_config_dict
from nemotron_jax.config.distill import DistillConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import limits, loop, report
from nemotron_jax.training.checkpoint import Checkpoints
from nemotron_jax.training.prepared import abstract_state, prepare_run
from nemotron_jax.training.summary import summary
from tests.training.runs import STEPS, changed, train


@pytest.fixture
def run(finished_run, tmp_path):
    """(config, directory) of a copy of the finished run, which may be damaged."""
    config, directory, _ = finished_run
    return config, shutil.copytree(directory, tmp_path / "run")


def test_a_finished_run_without_its_records_says_so(run):
    config, directory = run
    (directory / "metrics.jsonl").unlink()
    outcome = train(config, directory)
    assert outcome.finished and outcome.records == ()
    assert "not known: metrics.jsonl holds no evaluation" in summary(
        outcome.records, RunDirectory(directory)
    )


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_written(run):
    config, directory = run
    before = (directory / "config.json").read_bytes()
    fewer = changed(config, training={"steps": 5})
    with pytest.raises(ValueError, match=f"has {STEPS} steps behind it and training.steps=5"):
        train(fewer, directory)
    assert (directory / "config.json").read_bytes() == before


def test_a_file_with_a_checkpoint_s_name_is_none(run):
    config, directory = run
    for name in ("step_00000999", "step_00000998.partial"):
        (directory / "checkpoints" / name).touch()
    (directory / "checkpoints" / "step_00000990").mkdir()  # and an empty folder is damaged
    assert RunDirectory(directory).steps()[-2:] == [STEPS, 990]
    assert train(config, directory).finished
    with Checkpoints(RunDirectory(directory), 3) as checkpoints:
        state = checkpoints.restore(abstract_state(prepare_run(config))).state
        later = dataclasses.replace(state, step=jax.numpy.asarray(999, state.step.dtype))
        checkpoints.save(later, {}, {"config.json": "{}"})
    assert (directory / "checkpoints" / "step_00000999").is_dir()


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "plots", "corpus"])
def test_a_file_in_a_folder_s_place_is_named(finished_run, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is a file and must be a folder"):
        RunDirectory(tmp_path).check(finished_run[0])


def test_one_checkpoint_is_loaded_by_its_path(run, tmp_path):
    _, directory = run
    steps = RunDirectory(directory).steps()
    loaded = [nj.load_pretrained(directory / "checkpoints" / f"step_{s:08d}") for s in steps]
    assert [model.origin.step for model in loaded] == steps
    newest = nj.load_pretrained(directory)
    assert newest.origin.step == STEPS
    same = lambda a, b: np.array_equal(a.embedding[...], b.embedding[...])
    assert same(newest, loaded[-1]) and not same(newest, loaded[0])
    assert nj.load_pretrained(directory, mtp="drop").mtp_block is None
    with pytest.warns(UserWarning, match="writes bfloat16"):
        nj.save_pretrained(newest, tmp_path / "hub")
    tokenizer = (directory / "tokenizer.json").read_text()
    assert (tmp_path / "hub" / "tokenizer.json").read_text() == tokenizer
    again = nj.load_pretrained(tmp_path / "hub")
    assert again.config == newest.config and nj.load_tokenizer(tmp_path / "hub").eos == 2


def test_curves_that_cannot_be_written_hide_no_other_error(run, monkeypatch):
    config, directory = run

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.tensorboardX.SummaryWriter, "close", full)
    assert train(config, directory).finished


def test_a_damaged_tokenizer_names_its_copy(run):
    config, directory = run
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"keeps a copy in .*step_{STEPS:08d}/tokenizer.json"):
        train(config, directory)


def test_a_schedule_follows_steps_but_not_in_a_run_that_goes_on(run):
    config, directory = run
    values = to_config_dict(config)
    values.training.steps = 3 * STEPS
    longer = from_config_dict(RunConfig, values)
    scaled = {
        n: 3 * getattr(config.training.schedule, n)
        for n in ("warmup_tokens", "decay_tokens", "total_tokens")
    }
    assert longer.training.schedule == dataclasses.replace(config.training.schedule, **scaled)
    kept = RunDirectory(directory).with_saved_schedule(longer)
    assert kept.training.schedule == config.training.schedule
    RunDirectory(directory).check(kept)
    assert RunDirectory(directory / "absent").with_saved_schedule(longer) == longer
    values.training.schedule.total_tokens = 10**6
    values.training.steps = STEPS
    assert from_config_dict(RunConfig, values).training.schedule.total_tokens == 10**6


def test_the_last_record_holds_the_whole_text_once(run):
    config, directory = run
    calls = []

    def final(model, execution):
        calls.append(model)
        return {
            "held_out_loss": 2.0,
            "bits_per_byte": 1.5,
            "unigram_entropy": 1.6,
            "gzip_bits_per_byte": 3.0,
        }

    for _ in range(2):
        outcome = loop.run(
            prepare_run(config, RunDirectory(directory)), data=EmptyLoader(), final=final
        )
    assert len(calls) == 1 and outcome.records[-1]["whole_held_out_loss"] == 2.0
    stored = (directory / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(stored) == outcome.records[-1]
    told = summary(outcome.records, RunDirectory(directory))
    assert "2.000 nats/token, 0.400 above the entropy of single tokens (1.600)" in told
    assert "1.500 (gzip: 3.000)" in told


class EmptyLoader:
    """A loader of a run that has nothing left to train."""

    def restore(self, state: dict) -> None:
        pass


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"held_out_loss": None}, "held-out loss  not finite"),
        (
            {"held_out_loss": 1.0, "unigram_entropy": 3.0, "bits_per_byte": 1.25},
            "1.000 nats/token, 2.000 below the entropy of single tokens (3.000)\n"
            "bits per byte  1.250\n",
        ),
        ({"held_out_loss": 1.0}, "held-out loss  1.000 nats/token\nspeed"),
    ],
)
def test_a_summary_of_any_evaluation_is_told(tmp_path, record, words):
    assert words in summary(
        [{"step": 1, "tokens_per_second": None, **record}], RunDirectory(tmp_path)
    )


def test_what_cannot_fit_is_refused_by_the_field_that_is_too_large(finished_run, monkeypatch):
    config = finished_run[0]
    monkeypatch.setattr(limits, "_host_memory", lambda: 10_000_000)
    limits.check_memory(config)
    with pytest.raises(ValueError, match="data.batch_size=40000: a step of rows of 64 tokens"):
        limits.check_memory(changed(config, data={"batch_size": 40_000}))
    limits.check_memory(
        changed(config, data={"batch_size": 40_000}, training={"micro_batches": 10_000})
    )
    with pytest.raises(ValueError, match="RunConfig.model: its weights"):
        limits.check_memory(changed(config, model={"vocab_size": 100_000}))
    # 0.98 MB of weights with moments and gradient, 0.13 of hidden states; the teacher has 0.20.
    monkeypatch.setattr(limits, "_host_memory", lambda: 1_150_000)
    limits.check_memory(config)
    student = {"stage": "distill", "distill": DistillConfig(teacher="elsewhere")}
    with pytest.raises(ValueError, match="its weights, moments and gradient with its teacher"):
        limits.check_memory(dataclasses.replace(config, **student))
