"""All files of a report hold the same numbers, and none is ever half written."""

import base64
import json
import math
import re
from pathlib import Path

import pytest

from nemotron_jax.evaluation.kept import record_of
from nemotron_jax.evaluation.report import sentences, write_report
from nemotron_jax.evaluation.suite import Counts, Plot, Result, Table, Value

RESULT = Result(
    values={
        "accuracy": Value(0.62513, (0.5, 0.7501), 48, chance=0.25, items={"a": (1.0, 1.0)}),
        "tasks": Value(48, better=""),
        "unknown": Value(math.nan),
    },
    counts=Counts(truncated=3, infra_errors=1),
    tables=(Table("By kind", ("kind", "accuracy"), (("a|b", 0.5), ("<c>", 0.7501))),),
    plots=(
        Plot(
            "curve",
            "Curve",
            "tokens",
            "loss",
            {"model": ((1.0, 3.0, 2.5, 3.5), (2.0, 2.5, 2.4, 2.6))},
            {"zero": 0},
        ),
    ),
    headline=("accuracy",),
)
TWIN = Result(values={"accuracy": Value(0.26)})
FACTS = {
    "model": {
        "parameters_sha256": "a" * 64,
        "config_sha256": "b" * 64,
        "path_name": "toy_run",
        "parameters": 2_900_000,
        "pattern": "M*E",
        "dtype": "float32",
        "step": 400,
    },
    "seed": 7,
    "device": "1 × cpu",
    "versions": {"jax": "0.10.2"},
    "started": {"date": "2026-01-01T00:00:00+00:00"},
}
LINES = (
    {"suite": "toy", "task": "one", "index": 0, "sample": 0, "seed": 0, "prompt": "état\n"}
    | {"answer": "λ <b>", "tokens": 2, "finish_reason": "stop", "score": 1.0, "reason": "equal"}
    | {"gold": "λ", "answered": True},
    {"suite": "toy", "task": "two", "index": 1, "sample": 0, "seed": 0}
    | {"messages": [{"role": "user", "content": "```"}], "answer": "", "tokens": 9}
    | {"finish_reason": "length", "score": 0.0, "reason": "empty", "gold": 3, "answered": False},
)


def measured() -> dict:
    record = {"options": {"kinds": ["x"]}, "status": "ok", "why": "", "seconds": 1.5}
    return record | record_of(RESULT, TWIN)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    broken = {"options": {}, "status": "failed", "why": "the server is gone", "seconds": 0.0}
    records = {"toy": measured(), "broken": broken | record_of(Result({}))}
    return write_report(directory, FACTS, records, {"toy": "toys"}, LINES).parent


def test_the_files_agree(written: Path) -> None:
    names = {"report.json", "report.md", "report.html", "plots", "transcripts.jsonl"}
    assert {path.name for path in written.iterdir()} == names
    report = json.loads((written / "report.json").read_text("utf-8"))
    assert report["format"] == "nemotron_jax.report" and report["seed"] == 7
    toy = report["suites"]["toy"]
    assert toy["values"]["accuracy"] == {
        "mean": 0.62513,
        "interval": [0.5, 0.7501],
        "n": 48,
        "unit": "",
        "chance": 0.25,
        "untrained": 0.26,
        "better": "higher",
    }
    assert toy["values"]["unknown"]["mean"] is None  # strict JSON has no NaN
    assert toy["counts"] == {"truncated": 3, "no_answer": 0, "infra_errors": 1}
    markdown = (written / "report.md").read_text("utf-8")
    page = (written / "report.html").read_text("utf-8")
    for shown in ("0.6251", "48", "0.7501", "By kind", "Cut off: 3", "the server is gone"):
        assert shown in markdown and shown in page
    assert "a\\|b" in markdown and "&lt;c&gt;" in page and "<c>" not in page
    assert "plots/curve.png" in markdown
    curve = json.loads((written / "plots" / "curve.json").read_text())
    assert curve["curves"]["model"] == [[1.0, 3.0, 2.5, 3.5], [2.0, 2.5, 2.4, 2.6]]


def test_the_page_needs_no_other_file(written: Path) -> None:
    page = (written / "report.html").read_text("utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image) == (written / "plots" / "curve.png").read_bytes()
    order = [page.index(text) for text in ("In short", "Samples", "<h2>toy", "depend on", "a" * 64)]
    assert order == sorted(order)
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_transcripts_are_one_object_a_line(written: Path) -> None:
    lines = (written / "transcripts.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(LINES)


def test_sentences_judge_a_value_by_its_interval() -> None:
    record = measured()
    said = sentences(record)
    assert "better than chance (0.25) and better than the untrained model (0.26)" in said[0]
    assert "n = 48" in said[0] and "3 truncated, 1 infra errors" in said[1]
    value = record["values"]["accuracy"]
    value["chance"], value["untrained"] = 0.6, 0.9
    assert "not told from chance (0.6) and worse than the untrained model" in sentences(record)[0]
    value["better"] = "lower"
    assert "better than the untrained model" in sentences(record)[0]


def test_what_cannot_be_written_leaves_an_earlier_report_whole(written: Path) -> None:
    before = (written / "report.json").read_bytes()
    with pytest.raises(TypeError):
        write_report(written, FACTS, {}, {}, [{**LINES[0], "answer": object()}])
    assert (written / "report.json").read_bytes() == before
    assert not list(written.glob(".*"))
