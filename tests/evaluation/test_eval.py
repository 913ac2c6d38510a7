"""eval.py from its arguments to its report, and what it says when they are wrong."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from nemotron_jax import evaluate as evaluation
from nemotron_jax.config.execution import Execution
from nemotron_jax.evaluation import url
from nemotron_jax.evaluation.perplexity import result_of, score_held_out
from nemotron_jax.evaluation.probe import suite_probes
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.stages import pretrain

ENDED = types.SimpleNamespace(finished=False)  # a session of training that a signal stopped
ROOT = Path(__file__).parents[2]
HUB = ROOT / "tests" / "golden" / "public" / "hybrid_moe_latent" / "checkpoint"


def test_the_command_evaluates_a_run_by_its_own_configuration(
    run_directory,
    run_config,
    corpus,
    model,
    tmp_path,
) -> None:
    path = evaluation.evaluate(run_directory, "perplexity", tmp_path / "report").report
    found = json.loads(path.read_text("utf-8"))["suites"]["perplexity"]
    scores = score_held_out(model, corpus, run_config.data)
    expected = result_of(scores, corpus, run_config.data).values["bits_per_byte"]
    bits = found["values"]["bits_per_byte"]
    assert bits["mean"] == pytest.approx(expected.mean)
    assert bits["interval"] == pytest.approx(expected.interval)
    assert bits["n"] == expected.n and found["seconds"] > 0
    assert not (tmp_path / "report" / "data").exists()
    record = json.loads(path.read_text("utf-8"))
    assert record["model"]["step"] == 0 and len(record["model"]["parameters_sha256"]) == 64
    assert f"n = {expected.n}" in path.with_suffix(".md").read_text("utf-8")


def test_one_checkpoint_of_a_run_is_evaluated_by_its_path(run_directory, tmp_path) -> None:
    newest = max((run_directory / "checkpoints").glob("step_*"))
    evaluate = lambda checkpoint, name: json.loads(
        evaluation.evaluate(checkpoint, "perplexity", tmp_path / name).report.read_text("utf-8")
    )
    run, one = evaluate(run_directory, "run"), evaluate(newest, "one")
    assert one["model"] == run["model"]
    assert one["suites"]["perplexity"]["values"] == run["suites"]["perplexity"]["values"]


def test_other_data_is_read_with_the_checkpoints_tokenizer(
    run_directory,
    single_source,
    tmp_path,
) -> None:
    path = evaluation.evaluate(
        run_directory, "perplexity", tmp_path / "report", config=single_source
    ).report
    rows = json.loads(path.read_text("utf-8"))["suites"]["perplexity"]["tables"][1]["rows"]
    assert [row[0] for row in rows] == [Path(single_source.data.sources[0]).name]
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
        evaluation.evaluate(run_directory, "perplexty", output)
    with pytest.raises(ValueError, match="'speed' is named twice"):
        evaluation.evaluate(run_directory, "speed,speed", output)
    with pytest.raises(ValueError, match="names none"):
        evaluation.evaluate(run_directory, "", output)
    with pytest.raises(ValueError, match="absent.*config.json"):
        evaluation.evaluate(tmp_path / "absent", "speed", output)
    with pytest.raises(ValueError, match="'perplexity'.*pass --config"):
        evaluation.evaluate(HUB, "perplexity", output)
    config = dataclasses.replace(run_config, seed=1)
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        evaluation.evaluate(HUB, "perplexity", output, config=config)
    server = "http://127.0.0.1:9"
    for flag, value in (("dtype", "bfloat16"), ("mesh", "data=1"), ("experts", "nvfp4")):
        with pytest.raises(ValueError, match=f"--{flag}={value}: {server} is a server"):
            evaluation.evaluate(server, "tools", output, **{flag: value})
    for wrong in ("http://", "http://[::1", "http://host:port"):
        with pytest.raises(ValueError, match="names no server"):
            evaluation.evaluate(wrong, "tools", output)
    with pytest.raises(ValueError, match="--model=mine.* is a directory"):
        evaluation.evaluate(run_directory, "perplexity", output, model_name="mine")
    assert not output.exists()


def test_all_of_a_server_that_is_gone_has_failed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(url, "WAIT_S", 0.0)
    done = evaluation.evaluate("http://127.0.0.1:1", "all", tmp_path)
    found = json.loads(done.report.read_text("utf-8"))["suites"]
    status = {name: suite["status"] for name, suite in found.items()}
    assert done.status == 1 and status["perplexity"] == status["ruler"] == "skipped"
    assert {name for name in status if status[name] == "failed"} == {
        "environments",
        "tools",
        "serving",
    }


def test_the_command_line_says_one_sentence_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "eval.py", "--checkpoint=nowhere", f"--output={tmp_path}"]
    done = subprocess.run(
        [*command, "--suites=perplexity,sped"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("eval.py: suite 'sped' does not exist; the nearest is 'speed'")
    assert len(done.stderr.splitlines()) == 1


def stripped(value):
    """JSON without what depends on the clock and the device."""
    if isinstance(value, list):
        return [stripped(part) for part in value]
    if not isinstance(value, dict):
        return value
    gone = ("seconds", "cpu_seconds", "started", "device")
    keeps = lambda name: name not in gone and not name.endswith("_per_second")
    return {name: stripped(part) for name, part in value.items() if keeps(name)}


@pytest.mark.more
def test_the_same_seed_gives_the_same_bytes_and_rescoring_changes_nothing(
    run_directory, tmp_path
) -> None:
    suites = "perplexity:rows=4,longnll:length=48:rows=3:buckets=4,environments:tasks=2"
    suites += ":max_tokens=1400:max_turn_tokens=6:k=2"
    files = [evaluation.evaluate(run_directory, suites, tmp_path / n).report for n in ("a", "b")]
    first, second = (json.loads(file.read_text("utf-8")) for file in files)
    assert json.dumps(stripped(first)) == json.dumps(stripped(second))
    assert all(suite["status"] == "ok" for suite in first["suites"].values())
    lines = [(file.parent / "transcripts.jsonl").read_bytes() for file in files]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 2 * 2 * 2
    other = evaluation.evaluate(run_directory, suites, tmp_path / "c", seed=1).report
    assert (other.parent / "transcripts.jsonl").read_bytes() != lines[0]
    before = files[0].read_bytes()
    assert evaluation.command(["rescore", str(files[0].parent)]) == 0
    assert files[0].read_bytes() == before
    reward = first["suites"]["environments"]["values"]["reward"]
    assert reward["untrained"] is not None and reward["n"] == 4
    # Read token by token, a text's loss is that of the rows that perplexity scores.
    length, rows = 48, 3
    assert first["suites"]["longnll"]["tables"][0]["rows"][-1][1] == length - 1
    assert first["suites"]["longnll"]["values"]["nats_per_token"]["n"] == rows


@pytest.mark.more
def test_suites_are_measured_while_a_model_learns(
    run_directory, run_config, corpus, model, monkeypatch, tmp_path
) -> None:
    asked = lambda text: dataclasses.replace(
        run_config, logging=dataclasses.replace(run_config.logging, suites=text)
    )
    directory, caught = RunDirectory(run_directory), {}
    mesh = make_mesh(run_config.mesh, jax.devices()[:1])
    monkeypatch.setattr(pretrain.loop, "run", lambda run, **given: caught.update(given) or ENDED)
    assert pretrain.run(asked("perplexity:rows=4"), directory, mesh) == 0
    assert len(caught["probes"]) == 2
    found = caught["probes"][-1](model, Execution())
    scores = score_held_out(model, corpus, run_config.data, rows=4)
    expected = result_of(scores, corpus, run_config.data).values
    assert found["perplexity/bits_per_byte"] == pytest.approx(expected["bits_per_byte"].mean)
    assert set(found) == {f"perplexity/{name}" for name in expected}
    assert suite_probes(run_config, directory) == []
    for text, words in (
        ("all", "name the suites"),
        ("perplexty", "nearest is 'perplexity'"),
        ("acceptance", "no MTP block"),
    ):
        with pytest.raises(ValueError, match=words):
            suite_probes(asked(text), directory)


@pytest.mark.more
def test_a_mesh_measures_what_one_device_measures(run_directory, tmp_path) -> None:
    suites = "perplexity:rows=4,longnll:length=24:rows=2:buckets=2,cache_formats"
    found, crossed = {}, "tensor=2,expert=2,data=2"
    for mesh in ("", "data=2", crossed):
        path = evaluation.evaluate(run_directory, suites, tmp_path / f"m{mesh}", mesh=mesh).report
        found[mesh] = json.loads(path.read_text("utf-8"))["suites"]
    for suite, name in (("perplexity", "bits_per_byte"), ("longnll", "nats_per_token")):
        wanted, *others = [found[mesh][suite]["values"][name] for mesh in found]
        for values in others:
            assert values["mean"] == pytest.approx(wanted["mean"], rel=1e-5)
            assert values["interval"] == pytest.approx(wanted["interval"], rel=1e-4)
    assert found["data=2"]["cache_formats"]["status"] == "failed"
    assert "leave --mesh out" in found["data=2"]["cache_formats"]["why"]
