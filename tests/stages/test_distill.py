"""Stages that learn from a model: a student goes on where it was stopped, and what cannot be
learned from is refused in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.distill import DistillConfig, DraftObjective
from nemotron_jax.config.precision import NVFP4Config, PrecisionConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.stages import distill, pretrain
from tests.training.runs import changed, comparable, small_run, train, write_texts

PRECISION = PrecisionConfig(nvfp4_roles=("expert_up", "mamba_in"), nvfp4=NVFP4Config("nearest"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def first(texts, tmp_path_factory):
    """The directory of a run of six steps, and its config."""
    config = changed(
        small_run(texts, evaluate_every=3), training={"steps": 6}, data={"held_out_fraction": 0.3}
    )
    directory = tmp_path_factory.mktemp("first")
    train(config, directory)
    return config, directory


def run(stage, config, directory) -> list[dict]:
    """The records of a run of the stage, or on from where it was."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert stage.run(config, RunDirectory(directory), mesh) == 0
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def student(first, **chosen):
    config, directory = first
    config = changed(
        config,
        training={"mtp_depths": 0, "aux_loss_scale": 0.0, "router_bias_rate": 0.0},
        execution={"precision": PRECISION},
    )
    teaching = DistillConfig(**{"teacher": str(directory), "result_rows": 8} | chosen)
    return dataclasses.replace(config, stage="distill", distill=teaching, init_from=str(directory))


def boosted(first, **chosen):
    config, directory = first
    config = changed(config, training={"trains": "mtp", "mtp_depths": 3})
    objective = DraftObjective(
        **{"mtp": "kl", "text": "own", "own_steps": 4, "prompt_tokens": 8, "result_prompts": 4}
        | chosen
    )
    return dataclasses.replace(config, objective=objective, init_from=str(directory))


@pytest.mark.more
def test_a_student_stopped_and_begun_again_is_the_one_never_stopped(first, tmp_path) -> None:
    config = student(first)
    teacher = {name: np.array(leaf) for name, leaf in flatten(nj.load_pretrained(first[1])).items()}
    whole = run(distill, config, tmp_path / "whole")
    run(distill, changed(config, training={"steps": 3}), tmp_path / "parts")
    (tmp_path / "parts/metrics.jsonl").open("a").write('{"step": 4, "lo')  # as a kill leaves it
    parts = run(distill, config, tmp_path / "parts")
    named = lambda records: [r.get("teacher_kl") for r in records]
    assert comparable(parts) == comparable(whole) and named(parts) == named(whole)
    ours, theirs = (nj.load_pretrained(tmp_path / name) for name in ("parts", "whole"))
    for name, leaf in flatten(ours).items():
        np.testing.assert_array_equal(leaf, flatten(theirs)[name], name)
    for name, leaf in flatten(nj.load_pretrained(first[1])).items():
        np.testing.assert_array_equal(leaf, teacher[name], name)
    found = json.loads((tmp_path / "whole/result.json").read_text())
    assert found["stage"] == "distill" and found["n_tokens"] > 100
    assert set(found["loss"]) >= {"teacher", "student_before", "student_after"}
    assert 0 < found["teacher_kl"]["student_before"] < 0.1
    assert found["interval"][0] < found["interval"][1]
    before = (tmp_path / "whole/result.json").stat().st_mtime_ns
    run(distill, config, tmp_path / "whole")  # a finished one begun again changes nothing
    assert (tmp_path / "whole/result.json").stat().st_mtime_ns == before


@pytest.mark.more
def test_drafts_learn_from_the_backbone_which_stays_to_the_bit(first, tmp_path) -> None:
    config = boosted(first)
    whole = run(pretrain, config, tmp_path / "whole")
    run(pretrain, changed(config, training={"steps": 3}), tmp_path / "parts")  # within a writing
    parts = run(pretrain, config, tmp_path / "parts")
    assert comparable(parts) == comparable(whole)
    before, after = (flatten(nj.load_pretrained(path)) for path in (first[1], tmp_path / "whole"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("mtp_block.") for name in moved)
    found = json.loads((tmp_path / "whole/result.json").read_text())
    assert found["stage"] == "boosting" and found["k"] == 5
    assert found["backbone_sha256_before"] == found["backbone_sha256_after"] != ""
    for part in found["temperatures"].values():
        assert part["n"] == 4 and 1 <= part["before"] <= 6 and 1 <= part["after"] <= 6
        assert part["interval"][0] <= part["after"] - part["before"] <= part["interval"][1]
    assert len(found["by_position_before"]) == len(found["by_position_after"]) == 5
    assert 0 < whole[-1]["own_tokens"] <= 64 + 4


def directory_of(first, tmp_path, change):
    """The first run's directory with something changed."""
    copy = tmp_path / "copy"
    shutil.copytree(first[1], copy)
    change(copy)
    return str(copy)


def other_vocabulary(copy) -> None:
    values = json.loads((copy / "config.json").read_text())
    values["model"]["vocab_size"] = 640
    (copy / "config.json").write_text(json.dumps(values))


def other_tokenizer(copy) -> None:
    values = json.loads((copy / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.more
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda copy: (copy / "config.json").unlink(), "holds no config.json"),
        (other_vocabulary, "its vocabulary has 640 tokens and the student's 512"),
        (other_tokenizer, "its tokenizer is not the run's"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(first, tmp_path, change, named) -> None:
    teacher = directory_of(first, tmp_path, change)
    with pytest.raises(ValueError, match=named) as error:
        run(distill, student(first, teacher=teacher), tmp_path / "run")
    assert teacher in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


BAD = [
    (lambda c: dataclasses.replace(c, stage="distill"), "distill.teacher=''"),
    (
        lambda c: dataclasses.replace(
            changed(c, training={"trains": "mtp"}), stage="distill", distill=DistillConfig("t")
        ),
        "training.trains='mtp'",
    ),
    (lambda c: dataclasses.replace(c, objective=DraftObjective("kl")), "objective.mtp='kl'"),
    (
        lambda c: dataclasses.replace(
            changed(c, training={"trains": "mtp"}), objective=DraftObjective("kl")
        ),
        "RunConfig.init_from=''",
    ),
    (lambda c: dataclasses.replace(c, objective=DraftObjective(text="own")), "text='own'"),
    (
        lambda c: dataclasses.replace(
            changed(c, training={"trains": "mtp"}),
            objective=DraftObjective(text="own", prompt_tokens=64),
        ),
        "prompt_tokens=64: must be below data.sequence_length=64",
    ),
    (lambda c: DraftObjective("ce"), "mtp='ce': must be one of cross_entropy, kl"),
    (lambda c: DraftObjective(mtp_hidden="first"), "mtp_hidden='first'"),
    (lambda c: DraftObjective(mtp_temperature=0.0), "mtp_temperature=0"),
    (lambda c: DistillConfig(weight=1.5), "weight=1.5: must lie between 0 and 1"),
    (lambda c: DistillConfig(temperature=-1.0), "temperature=-1"),
    (lambda c: DistillConfig(dtype="int8"), "dtype='int8'"),
    (lambda c: DistillConfig("gs://bucket/run"), "is a URL"),
    (lambda c: DistillConfig(result_rows=0), "result_rows=0"),
]


@pytest.mark.parametrize(("build", "named"), BAD, ids=[named for _, named in BAD])
def test_a_run_that_has_nothing_to_learn_from_is_refused(build, named) -> None:
    with pytest.raises(ValueError, match="DistillConfig|DraftObjective|RunConfig") as error:
        build(small_run("somewhere"))
    assert named in str(error.value) and "\n" not in str(error.value)
