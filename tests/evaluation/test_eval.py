"""eval.py from its arguments to its report, and what it says when they are wrong."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
from nemotron_jax.evaluation.evaluator import Subject
from nemotron_jax.evaluation.perplexity import Perplexity

ROOT = Path(__file__).parents[2]
HUB = ROOT / "tests" / "golden" / "public" / "hybrid_moe_latent" / "checkpoint"


def test_the_command_evaluates_a_run_by_its_own_configuration(
    run_directory,
    run_config,
    corpus,
    model,
    tmp_path,
) -> None:
    path = evaluation.evaluate(run_directory, ["perplexity"], tmp_path / "report")
    found = json.loads(path.read_text("utf-8"))["suites"]["perplexity"]
    expected = Perplexity(corpus, run_config.data).run(model)
    assert found["values"]["bits_per_byte"] == pytest.approx(expected.values["bits_per_byte"])
    assert found["n"] == expected.n and found["wall_s"] > 0
    assert not (tmp_path / "report" / "data").exists()
    record = json.loads(path.read_text("utf-8"))
    assert record["step"] == max(record["checkpoint_steps"])
    assert f"n = {expected.n} held-out documents" in path.with_suffix(".md").read_text("utf-8")


def test_one_checkpoint_of_a_run_is_evaluated_by_its_path(run_directory, tmp_path) -> None:
    newest = max((run_directory / "checkpoints").glob("step_*"))
    evaluate = lambda checkpoint, name: json.loads(
        evaluation.evaluate(checkpoint, ["perplexity"], tmp_path / name).read_text("utf-8")
    )
    run, one = evaluate(run_directory, "run"), evaluate(newest, "one")
    assert one["step"] == run["step"] and one["checkpoint_steps"] == run["checkpoint_steps"]
    assert one["suites"]["perplexity"]["values"] == run["suites"]["perplexity"]["values"]


def test_other_data_is_read_with_the_checkpoints_tokenizer(
    run_directory,
    single_source,
    tmp_path,
) -> None:
    path = evaluation.evaluate(
        run_directory, ["perplexity"], tmp_path / "report", config=single_source
    )
    rows = json.loads(path.read_text("utf-8"))["suites"]["perplexity"]["tables"][1]["rows"]
    assert [row[0] for row in rows] == [single_source.data.sources[0]]
    own = (run_directory / "tokenizer.json").read_text("utf-8")
    assert (path.parent / "data" / "tokenizer.json").read_text("utf-8") == own


def test_a_tokenizer_that_is_not_the_model_s_is_refused(
    run_directory, single_source, tmp_path
) -> None:
    """By the model that is evaluated, whatever model the configuration of the data names."""
    for change, words in (
        ({"eos_token": 7}, "ends a document with id 2, and the model with eos_token=7"),
        ({"vocab_size": 300}, "more than the model's vocab_size=300"),
    ):
        model = dataclasses.replace(single_source.model, **change)
        with pytest.raises(ValueError, match=words):
            Subject(run_directory, single_source, tmp_path, model=model).corpus  # noqa: B018
    other = dataclasses.replace(
        single_source, model=dataclasses.replace(single_source.model, vocab_size=100)
    )
    subject = Subject(run_directory, other, tmp_path, model=single_source.model)
    assert subject.corpus.held_out.tokens.size > 0


def test_wrong_requests_are_refused_before_anything_is_written(
    run_directory,
    run_config,
    tmp_path,
) -> None:
    output = tmp_path / "report"
    with pytest.raises(ValueError, match="'perplexty'.*nearest is 'perplexity'"):
        evaluation.evaluate(run_directory, ["perplexty"], output)
    with pytest.raises(ValueError, match="'speed' is named twice"):
        evaluation.evaluate(run_directory, ["speed", "speed"], output)
    with pytest.raises(ValueError, match="none is named"):
        evaluation.evaluate(run_directory, [], output)
    with pytest.raises(ValueError, match="absent.*config.json"):
        evaluation.evaluate(tmp_path / "absent", ["speed"], output)
    with pytest.raises(ValueError, match="'perplexity'.*pass --config"):
        evaluation.evaluate(HUB, ["perplexity"], output)
    config = dataclasses.replace(run_config, seed=1)
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        evaluation.evaluate(HUB, ["perplexity"], output, config=config)
    assert not output.exists()


def test_the_command_line_says_one_sentence_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "eval.py", "--checkpoint=nowhere", f"--output={tmp_path}"]
    done = subprocess.run(
        [*command, "--suites=perplexity,sped"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("eval.py: suite 'sped' does not exist; the nearest is 'speed'")
    assert len(done.stderr.splitlines()) == 1
