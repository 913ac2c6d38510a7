"""All files of a report hold the same numbers, and none is ever half written."""

import json
import math
from pathlib import Path

import pytest

from nemotron_jax.evaluation.evaluator import Plot, Result, Subject, Table
from nemotron_jax.evaluation.report import SuiteRun, metadata, write_report

RESULT = Result(
    values={"accuracy": 0.62513, "tasks": 48},
    n=48,
    standard_errors={"accuracy": math.nan},
    tables=(Table("By kind", ("kind", "accuracy"), (("a|b", 0.5), ("<c>", 0.7501))),),
    plots=(
        Plot("curve", "Curve", "tokens", "loss", {"model": ((1.0, 3.0), (2.0, 2.5))}, {"zero": 0}),
    ),
    transcripts=({"prompt": "état\n", "answer": "λ"}, {"prompt": "x", "answer": ""}),
)


@pytest.fixture
def written(tmp_path, model, run_config, run_directory):
    facts = metadata(model, Subject(run_directory, run_config, run_directory, seed=7))
    path = write_report(tmp_path / "report", facts, {"toy": SuiteRun(RESULT, 1.5)})
    return path.parent


def test_the_files_agree(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "plots",
        "transcripts.jsonl",
    }
    report = json.loads((written / "report.json").read_text("utf-8"))
    toy = report["suites"]["toy"]
    assert toy["values"] == RESULT.values and toy["n"] == 48 and toy["wall_s"] == 1.5
    assert toy["standard_errors"] == {"accuracy": None}  # strict JSON has no NaN
    markdown = (written / "report.md").read_text("utf-8")
    page = (written / "report.html").read_text("utf-8")
    for shown in ("0.6251", "48", "0.7501", "plots/curve.png", "By kind"):
        assert shown in markdown and shown in page
    assert "a\\|b" in markdown and "&lt;c&gt;" in page and "<c>" not in page
    assert (written / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((written / "plots" / "curve.json").read_text())
    assert curve["curves"]["model"] == [[1.0, 3.0], [2.0, 2.5]]


def test_transcripts_are_one_object_a_line(written: Path) -> None:
    lines = (written / "transcripts.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"suite": "toy", **transcript} for transcript in RESULT.transcripts
    ]


def test_the_report_says_what_its_numbers_depend_on(written: Path, model, run_directory) -> None:
    report = json.loads((written / "report.json").read_text("utf-8"))
    assert report["checkpoint"] == str(run_directory) and report["checkpoint_steps"] == [0]
    assert report["seed"] == 7 and len(report["config_sha256"]) == 64
    assert report["model"]["pattern"] == model.config.pattern
    assert report["versions"]["jax"] and "cpu" in report["device"]


def test_a_failing_suite_leaves_an_earlier_report_whole(written: Path, model, run_config) -> None:
    before = (written / "report.json").read_bytes()
    broken = Result(values={}, n=0, transcripts=({"answer": object()},))
    facts = json.loads(before)
    with pytest.raises(TypeError):
        write_report(written, facts, {"broken": SuiteRun(broken, 0.0)})
    assert (written / "report.json").read_bytes() == before
    assert not list(written.glob(".*"))
