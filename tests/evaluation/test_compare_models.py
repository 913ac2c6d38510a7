"""Comparisons of a real model: it is told from what it was before it learned, and not from itself
with other draws."""

import dataclasses
import os
from pathlib import Path

import jax
import pytest

from configs import pretrain_tiny
from nemotron_jax import stages
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.evaluation import acceptance, kept
from nemotron_jax.evaluation.compare import Side, compare_sides
from nemotron_jax.evaluation.context import Shared, untrained_twin
from nemotron_jax.evaluation.runner import Runner
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suites import Planned
from nemotron_jax.pretrained import load_pretrained
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh

SEEDS, LEVEL = 20, 0.05
# The suite whose figures hang on draws of a model that solves no task: sixteen prompts.
OPTIONS = acceptance.Options(k=1, prompts=4, new_tokens=32)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A run of configs/pretrain_tiny.py: that of NEMOTRON_RUN where it is set."""
    if "NEMOTRON_RUN" in os.environ:
        return Path(os.environ["NEMOTRON_RUN"])
    directory = tmp_path_factory.mktemp("tiny")
    config = from_config_dict(RunConfig, pretrain_tiny.get_config())
    config = dataclasses.replace(config, mesh=MeshConfig())
    stages.run(config, RunDirectory(directory), make_mesh(config.mesh, jax.devices()[:1]))
    return directory


@pytest.mark.slow  # half a minute of CPU, beside the ten minutes in which the model learns
def test_a_trained_model_is_told_from_an_untrained_one_and_not_from_itself(
    learned, tmp_path
) -> None:
    model = load_pretrained(learned)
    models = {"trained": model, "untrained": untrained_twin(model)}

    def side(name: str, seed: int) -> Side:
        # Without a configuration it reads no held-out text, which no seed changes.
        subject = Subject(learned, None, learned, seed, model.config, loaded_from=learned)
        shared = Shared(models[name], tokenizer=subject.tokenizer)
        runner = Runner(subject, tmp_path, {"seed": seed, "side": name}, shared)
        record = runner.run([Planned(acceptance.SUITE, OPTIONS)], {})["acceptance"]
        found = kept.read(tmp_path / "suites" / record["kept"])
        assert found["status"] == "ok", found["why"]
        return Side(f"{name}_{seed}", {"acceptance": found}, ())

    def p_of(a: Side, b: Side) -> float:
        pairs, missing = compare_sides(a, b, LEVEL)
        assert not missing
        return {one.metric: one.p for one in pairs}["mean_length_1"]

    own = [side("trained", seed) for seed in range(2 * SEEDS)]
    of_others = [p_of(side("untrained", seed), own[seed]) for seed in range(SEEDS)]
    of_itself = [p_of(own[seed], own[SEEDS + seed]) for seed in range(SEEDS)]
    told = [sum(p < LEVEL for p in found) for found in (of_others, of_itself)]
    print(f"told from the untrained model: {told[0]} of {SEEDS}, largest p {max(of_others):.2g}")
    print(f"told from itself: {told[1]} of {SEEDS}, smallest p {min(of_itself):.2g}")
    assert told[0] == SEEDS and told[1] <= 3
