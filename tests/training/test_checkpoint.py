"""A checkpoint is whole or not there; a damaged one is named, and an older one taken."""

import dataclasses
import json
import logging
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nemotron_jax as nj
from nemotron_jax.config.convert import to_json
from nemotron_jax.manifest import find_fault
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import checkpoint
from nemotron_jax.training.checkpoint import (
    Checkpoints,
    load_parameters,
    optimizer_table,
)
from nemotron_jax.training.prepared import init_state, prepare_run
from nemotron_jax.training.state import TrainState
from tests.training.runs import ROOT, small_run

POSITION = {"step": 3, "grain": {"nested": [1, 2]}}


@pytest.fixture(scope="module")
def config():
    return small_run("somewhere")


@pytest.fixture(scope="module")
def abstract(config):
    return jax.eval_shape(lambda: init_state(prepare_run(config)))


@pytest.fixture(scope="module")
def make_state(abstract):
    """Makes the state of a step: every leaf random, by the step's number."""

    def make(step: int) -> TrainState:
        generator = np.random.default_rng(step)
        fill = lambda leaf: jnp.asarray(generator.normal(size=leaf.shape).astype(leaf.dtype))
        count = lambda value: jnp.asarray(value, jnp.int32)
        state = jax.tree.map(fill, abstract)
        return dataclasses.replace(
            state, step=count(step), skipped=count(step // 2), skipped_in_a_row=count(1)
        )

    return make


@pytest.fixture
def saved(config, make_state, tmp_path):
    """A run directory with whole checkpoints of the steps 3, 6 and 9."""
    with Checkpoints(RunDirectory(tmp_path), keep=3) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(make_state(step), POSITION, files(config))
    return tmp_path


def files(config):
    return {"config.json": to_json(config), "tokenizer.json": "{}"}


def restore(directory, like):
    with Checkpoints(RunDirectory(directory), keep=3) as checkpoints:
        return checkpoints.restore(like)


def assert_equal(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_restored_is_saved(saved, abstract, make_state, config):
    restored = restore(saved, abstract)
    assert_equal(restored.state, make_state(9))
    assert (restored.step, restored.data_position) == (9, POSITION)
    assert RunDirectory(saved).saved().config == config
    folder = saved / "checkpoints/step_00000009"
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "state.json").read_text())["format_version"] == 1


def test_arrays_are_saved_under_plain_names(saved, abstract):
    meta = json.loads((saved / "checkpoints/step_00000009/state.json").read_text())
    assert set(meta["arrays"]["model"]) == set(flatten(abstract.model))
    names = set(meta["arrays"]["optimizer"])
    assert {"count", "mu.final_norm.weight", "nu.final_norm.weight"} <= names
    assert names == set(optimizer_table(abstract.optimizer))


def test_the_newest_are_kept(saved, config, make_state, abstract):
    with Checkpoints(RunDirectory(saved), keep=1) as checkpoints:
        checkpoints.save(make_state(12), POSITION, files(config))
    assert RunDirectory(saved).steps() == [12]
    assert_equal(restore(saved, abstract).state, make_state(12))


def data_files(directory, step):
    folder = directory / f"checkpoints/step_{step:08d}"
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def cut_short(file):
    os.truncate(file, file.stat().st_size - 1)


TEXTS = {
    "deep": "[" * 100_000,
    "null": "null",
    "no files": '{"files": []}',
    "a huge size": '{"files": {"state.json": {"bytes": 1e999, "sha256": ""}}}',
    "a name of zero": '{"files": {"\\u0000": {"bytes": 1, "sha256": ""}}}',
    "a name of half a pair": '{"files": {"\\ud800": {"bytes": 1, "sha256": ""}}}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_manifest_that_says_something_else_is_a_fault(tmp_path, kind):
    (tmp_path / "manifest.json").write_text(TEXTS[kind])
    assert find_fault(tmp_path)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.remove], ids=lambda d: d.__name__)
def test_any_damaged_file_is_named_and_an_older_checkpoint_taken(
    saved, abstract, make_state, caplog, damage
):
    for number, file in enumerate(data_files(saved, 9)):
        if file.stat().st_size == 0:
            continue
        content = file.read_bytes()
        damage(file)
        with caplog.at_level(logging.WARNING):
            assert str(file) in find_fault(saved / "checkpoints/step_00000009")
            if number % 6 == 0:
                assert_equal(restore(saved, abstract).state, make_state(6))
                assert str(file) in caplog.text and "step_00000006" in caplog.text
        file.write_bytes(content)
    assert_equal(restore(saved, abstract).state, make_state(9))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.remove], ids=lambda d: d.__name__)
def test_a_damaged_manifest_too(saved, abstract, make_state, damage):
    damage(saved / "checkpoints/step_00000009/manifest.json")
    assert_equal(restore(saved, abstract).state, make_state(6))


def test_without_any_whole_one_nothing_is_begun_anew(saved, abstract):
    for step in (3, 6, 9):
        flip_a_bit(data_files(saved, step)[-1])
    with pytest.raises(ValueError, match="no whole checkpoint.*step_00000009.*step_00000003"):
        restore(saved, abstract)
    assert load_parameters(RunDirectory(saved))  # the tokenizer's file is no part of that
    for step in (3, 6, 9):
        flip_a_bit(
            next(f for f in data_files(saved, step) if "model" in f.parts and "d" in f.parts)
        )
    with pytest.raises(ValueError, match="no whole checkpoint"):
        load_parameters(RunDirectory(saved))


def test_a_damaged_future_gives_way_to_new_saves(saved, config, abstract, make_state):
    flip_a_bit(data_files(saved, 9)[-1])
    with Checkpoints(RunDirectory(saved), keep=1) as checkpoints:
        assert checkpoints.restore(abstract).step == 6
        checkpoints.save(make_state(8), POSITION, files(config))
        checkpoints.wait()
        assert RunDirectory(saved).steps() == [8]
    flip_a_bit(data_files(saved, 8)[-1])
    with Checkpoints(RunDirectory(saved), keep=1) as checkpoints:
        checkpoints.save(make_state(8), POSITION, files(config))
    assert_equal(restore(saved, abstract).state, make_state(8))


def test_leftovers_of_a_killed_save_are_removed(saved, abstract, make_state):
    folder = saved / "checkpoints"
    for name in ("step_00000012.partial", "step_00000001.removed"):
        (folder / name / "arrays").mkdir(parents=True)
        (folder / name / "arrays" / "data").write_text("half")
    (folder / "notes.txt").write_text("of the user")
    assert_equal(restore(saved, abstract).state, make_state(9))
    kept = ["notes.txt", "step_00000003", "step_00000006", "step_00000009"]
    assert sorted(path.name for path in folder.iterdir()) == kept


def test_a_save_does_not_see_later_steps(config, make_state, tmp_path, abstract):
    """The buffers are donated to the next steps while the save is under way."""
    state, expected = make_state(3), make_state(3)
    spoil = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 + 7, s), donate_argnums=0)
    with Checkpoints(RunDirectory(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, POSITION, files(config))
        for _ in range(20):
            state = spoil(state)
    assert_equal(restore(tmp_path, abstract).state, expected)


def test_another_model_is_named(saved, config, abstract):
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, width=64))
    with pytest.raises(
        ValueError, match=r"k.weight is float32\[1, 32, 16\], needed is float32\[1, 64, 16\]"
    ):
        restore(saved, jax.eval_shape(lambda: init_state(prepare_run(other))))


def test_an_optimizer_state_keeps_its_names_in_another_chain():
    parameters = {"a": jnp.ones(3)}
    plain = optax.chain(optax.scale_by_adam()).init(parameters)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()).init(parameters)
    assert (
        list(optimizer_table(plain)) == list(optimizer_table(clipped)) == ["count", "mu.a", "nu.a"]
    )


def test_the_facade_reads_a_run(saved, config, make_state):
    (saved / "config.json").write_text(to_json(config))
    model = nj.load_pretrained(saved)
    assert_equal(flatten(model), flatten(make_state(9).model))
    assert isinstance(model, Nemotron) and model.config == config.model
    half = flatten(nj.load_pretrained(saved, dtype="bfloat16"))
    assert half["embedding"].dtype == jnp.bfloat16
    assert half["mamba.mixer.A_log"].dtype == jnp.float32
    assert load_parameters(RunDirectory(saved, 3))[-1].keys() == flatten(model).keys()
    assert_equal(load_parameters(RunDirectory(saved, 3))[-1], flatten(make_state(3).model))
    with pytest.raises(ValueError, match="step_00000004.*choose one of"):
        load_parameters(RunDirectory(saved, 4))


def test_parameters_are_read_past_a_damaged_optimizer_state(saved, make_state):
    damaged = [f for f in data_files(saved, 9) if "optimizer" in f.parts and f.stat().st_size]
    flip_a_bit(damaged[0])
    assert_equal(load_parameters(RunDirectory(saved))[-1], flatten(make_state(9).model))


def test_an_empty_directory_has_no_parameters(tmp_path, abstract):
    assert RunDirectory(tmp_path).saved() is None and restore(tmp_path, abstract) is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_parameters(RunDirectory(tmp_path))


FULL_DISK = """
import resource, signal, sys
from nemotron_jax.run_directory import RunDirectory
from tests.training.test_checkpoint import POSITION, files, full_disk_state
from nemotron_jax.training.checkpoint import Checkpoints
from tests.training.runs import small_run
config = small_run("somewhere")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with Checkpoints(RunDirectory(sys.argv[1]), keep=1) as checkpoints:
        state = full_disk_state(config)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        checkpoints.save(state, POSITION, files(config))
except OSError as error:
    print("caught:", error)
"""


def full_disk_state(config):
    generator = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: init_state(prepare_run(config)))
    fill = lambda leaf: jnp.asarray(generator.normal(size=leaf.shape).astype(leaf.dtype))
    return dataclasses.replace(jax.tree.map(fill, abstract), step=jnp.asarray(12, jnp.int32))


def test_a_full_disk_is_one_error_and_older_checkpoints_stay(saved, abstract, make_state):
    """A limit on the size of files stands in for the disk's end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(saved)], cwd=ROOT, capture_output=True, text=True
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert "caught:" in result.stdout, result.stderr[-3000:]
    assert "step_00000012 could not be saved" in result.stdout
    assert "bytes" in result.stdout
    assert_equal(restore(saved, abstract).state, make_state(9))
    names = sorted(path.name for path in (saved / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000009"]


def test_an_error_in_the_background_is_raised_by_the_next_call(
    saved, config, make_state, monkeypatch
):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with Checkpoints(RunDirectory(saved), keep=3) as checkpoints:
        monkeypatch.setattr(checkpoint, "write_manifest", fail)
        checkpoints.save(make_state(12), POSITION, files(config))
        with pytest.raises(OSError, match="step_00000012 could not be saved.*bytes"):
            checkpoints.wait()
        monkeypatch.undo()
        checkpoints.save(make_state(12), POSITION, files(config))
    assert RunDirectory(saved).steps() == [6, 9, 12]
