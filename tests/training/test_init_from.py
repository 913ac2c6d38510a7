"""A run that begins with the parameters of another goes on from them, with that one's tokenizer."""

import dataclasses
import shutil

import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.data import companions
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.model.adapters import merge_adapters
from nemotron_jax.model.parameters import flatten
from nemotron_jax.pretrained import data_of
from nemotron_jax.run_directory import RunDirectory
from tests.training.runs import changed, small_run, train


def begun(finished_run, steps: int = 2):
    """A run of a few steps that trains the finished run's MTP block alone, on the same texts."""
    config, directory, _ = finished_run
    config = changed(config, training={"steps": steps, "trains": "mtp"})
    return dataclasses.replace(config, init_from=str(directory))


def test_healing_moves_the_mtp_block_and_nothing_else(finished_run, tmp_path) -> None:
    _, directory, outcome = finished_run
    healed = train(begun(finished_run), tmp_path)
    before, after = (flatten(nj.load_pretrained(path)) for path in (directory, tmp_path))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("mtp") for name in moved)
    losses = [record["held_out_loss"] for record in healed.records if "held_out_loss" in record]
    assert losses[-1] == pytest.approx(outcome.records[-1]["held_out_loss"], rel=1e-6)
    same = [nj.load_tokenizer(path).fingerprint() for path in (directory, tmp_path)]
    assert same[0] == same[1]


def test_the_tokenizer_comes_with_the_parameters(finished_run, tmp_path) -> None:
    config = begun(finished_run)
    assert (
        data_of(config.data, config.init_from, RunDirectory(tmp_path)).tokenizer == config.init_from
    )
    assert data_of(small_run("texts").data, "", RunDirectory(tmp_path)).tokenizer == "train"
    (tmp_path / "tokenizer.json").touch()  # the run has one already
    assert data_of(config.data, config.init_from, RunDirectory(tmp_path)).tokenizer == "train"
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer.json; name the one"):
        data_of(config.data, str(tmp_path / "bare"), RunDirectory(tmp_path / "new"))


def test_another_model_is_refused(finished_run, tmp_path) -> None:
    config = changed(begun(finished_run), model={"init_std": 0.2})
    with pytest.raises(ValueError, match="its model differs from the run's in init_std"):
        train(config, tmp_path)


def test_a_run_s_export_has_the_companions_of_the_hub_model(finished_run, tmp_path) -> None:
    config, directory, _ = finished_run
    hub = tmp_path / "model"
    hub.mkdir()
    files = {
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": '{"x": 1}',
        "generation_config.json": '{"eos_token_id": [2, 11], "top_p": 0.95}',
    }
    for name, text in files.items():
        (hub / name).write_text(text)
    run = shutil.copytree(directory, tmp_path / "run", ignore=shutil.ignore_patterns("hub"))
    companions.keep(RunDirectory(run), config.model, str(hub), chats=False)
    shutil.rmtree(hub)
    model = merge_adapters(nj.load_pretrained(run))
    assert default_stop_tokens(model) == (2, 11)
    nj.save_pretrained(model, tmp_path / "out", dtype="float32")
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()
    assert default_stop_tokens(nj.load_pretrained(tmp_path / "out")) == (2, 11)
