"""A run's directory: one place knows its names, and whether a config.json is a run's."""

import ast
import dataclasses
import json
import pathlib
import re

import pytest

from configs import pretrain_tiny
from nemotron_jax.config.convert import from_config_dict, to_json
from nemotron_jax.config.run import RunConfig
from nemotron_jax.manifest import write_manifest
from nemotron_jax.run_directory import RunDirectory, Saved
from tests.golden_cases import GOLDEN

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = from_config_dict(RunConfig, pretrain_tiny.get_config())
HUB = GOLDEN / "hybrid_moe_latent" / "checkpoint"
PLACES = [name for name, kind in vars(RunDirectory).items() if isinstance(kind, property)]
# Other directories have files of these names: a hub model's, and the report of an evaluation.
OWN_NAMES = {
    "nemotron_jax/config/hub.py": {"config.json"},
    "nemotron_jax/evaluation/compare.py": {"plots"},
    "nemotron_jax/evaluation/report.py": {"plots", "transcripts.jsonl"},
    "nemotron_jax/interop": {"config.json", "tokenizer.json"},
}


def longer(steps: int) -> RunConfig:
    training = dataclasses.replace(CONFIG.training, steps=steps)
    return dataclasses.replace(CONFIG, training=training)


def save(run: RunDirectory, step: int, config: RunConfig = CONFIG) -> None:
    """A checkpoint without arrays."""
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    (folder / run.config.name).write_text(to_json(config))
    write_manifest(folder)


def spelled(tree: ast.Module, names: set[str]) -> set[str]:
    """The names that a module's strings spell: of files anywhere but in sentences and docstrings,
    of folders, which are words, in paths alone."""
    nodes = list(ast.walk(tree))
    documents = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    joined = {id(node.right) for node in nodes if isinstance(node, ast.BinOp)}
    found = set()
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = set(re.split("[/*]+", node.value)) & names
            is_path = id(node) in joined or "/" in node.value
            found |= {part for part in parts if "." in part or is_path} - (
                parts if id(node) in documents else set()
            )
    return found


def test_no_other_module_spells_its_names() -> None:
    run = RunDirectory(pathlib.Path())
    names = {getattr(run, place).name for place in PLACES}
    files = [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "nemotron_jax").rglob("*.py")]
    for file in files:
        where = file.relative_to(ROOT).as_posix()
        own = set().union(*(n for place, n in OWN_NAMES.items() if where.startswith(place)))
        if where != "nemotron_jax/run_directory.py":
            assert not spelled(ast.parse(file.read_text("utf-8")), names - own), where
    wrong = 'x = run / "checkpoints/step_*"\ny = f"{run}/metrics.jsonl"\nz = run / "corpus"'
    assert spelled(ast.parse(wrong), names) == {"checkpoints", "metrics.jsonl", "corpus"}
    assert not spelled(ast.parse('"""plots/a.png"""\nx = {"corpus": "no metrics.jsonl"}'), names)


def test_it_is_known_by_its_config_or_by_a_checkpoint(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    assert RunDirectory.of(tmp_path) is None and RunDirectory.of(HUB) is None
    assert RunDirectory.of(tmp_path / "absent") is None and run.saved() is None
    run.config.write_text(to_json(CONFIG))
    assert RunDirectory.of(str(tmp_path)) == run and run.read() == CONFIG
    save(run, 7, longer(9))
    named = RunDirectory.of(run.checkpoint(7))
    assert named == RunDirectory(tmp_path, step=7) and named.read() == longer(9)
    assert run.saved() == named.saved() == Saved(longer(9), 7)
    run.config.write_text(json.dumps({"format_version": 1, "model_type": "nemotron_h"}))
    assert RunDirectory.of(tmp_path) is None
    run.config.write_text("[")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        RunDirectory.of(tmp_path)


def test_the_newest_whole_configuration_counts(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    save(run, 3, longer(30))
    save(run, 6, longer(60))
    (run.checkpoint(6) / run.config.name).write_text("{}")
    assert run.steps() == [3, 6] and run.saved() == Saved(longer(30), 3)
    assert run.with_saved_schedule(CONFIG).training.schedule == CONFIG.training.schedule


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_is_taken_is_told(tmp_path, place) -> None:
    path = getattr(RunDirectory(tmp_path), place)
    folder = path.suffix == ""
    path.touch() if folder else path.mkdir()
    rule = "a file and must be a folder" if folder else "a folder and must be a file"
    with pytest.raises(ValueError, match=rf"{path} is {rule}; move it away"):
        RunDirectory(tmp_path).check(CONFIG)


def test_another_run_and_a_longer_one_are_refused(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    save(run, 5)
    run.check(longer(5))
    with pytest.raises(ValueError, match=r"has 5 steps behind it and training.steps=4 asks"):
        run.check(longer(4))
    with pytest.raises(ValueError, match=r"was begun with other values: seed=1, was 0"):
        run.check(dataclasses.replace(CONFIG, seed=1))
