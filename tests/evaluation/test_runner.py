"""Each suite is kept when it ends: none costs the others their report; a second call goes on."""

import dataclasses
import json
import os
import signal

import pytest

from nemotron_jax.evaluation import kept, rescore
from nemotron_jax.evaluation.report import write_report
from nemotron_jax.evaluation.runner import Runner, check_ready
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suites import Planned
from tests.evaluation import toy_suites
from tests.evaluation.test_report import FACTS

NAMES = ("first", "second", "third")


def plans(names, *, named=True, **options):
    suites = [getattr(toy_suites, name.upper()) for name in names]
    return [Planned(suite, suite.options(**options), named) for suite in suites]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv(toy_suites.LOG, str(tmp_path / "log"))
    subject = Subject(None, None, tmp_path / "data", url="http://nowhere")

    def one(names=NAMES, *, seed=0, why=None, named=True, output="out", **options):
        runner = Runner(subject, tmp_path / output, {"seed": seed})
        asked = plans(names, named=named, **options)
        records = runner.run(asked, why or {})
        write_report(tmp_path / output, FACTS, records, {}, runner.lines)
        return records

    one.ran = lambda: (tmp_path / "log").read_text().split()
    one.directory = tmp_path / "out"
    return one


def test_what_is_kept_is_not_run_again(run) -> None:
    first = run()
    report = (run.directory / "report.json").read_bytes()
    transcripts = (run.directory / "transcripts.jsonl").read_bytes()
    again = run()
    assert run.ran() == list(NAMES)
    assert {n: r["values"] for n, r in first.items()} == {n: r["values"] for n, r in again.items()}
    assert (run.directory / "report.json").read_bytes() == report
    assert (run.directory / "transcripts.jsonl").read_bytes() == transcripts
    assert len(transcripts.splitlines()) == 3 * 4
    run(("first",), tasks=2)  # other options
    run(("first",), seed=1)
    assert run.ran() == [*NAMES, "first", "first"]


@pytest.mark.parametrize("fatal", NAMES)
def test_killed_in_any_suite_and_started_again_it_goes_on(run, fatal) -> None:
    if (child := os.fork()) == 0:
        os.environ[toy_suites.FATAL] = fatal
        run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = list(NAMES[: NAMES.index(fatal) + 1])
    assert run.ran() == before and not (run.directory / "report.json").exists()
    run()
    assert run.ran() == before + list(NAMES[NAMES.index(fatal) :])
    run(output="never_stopped")
    both = (run.directory, run.directory.parent / "never_stopped")
    first, second = (stripped(json.loads((d / "report.json").read_text())) for d in both)
    assert first == second
    assert len({(d / "transcripts.jsonl").read_bytes() for d in both}) == 1


def stripped(value):
    """JSON without what depends on the clock and the place."""
    if isinstance(value, list):
        return [stripped(part) for part in value]
    if not isinstance(value, dict):
        return value
    gone = ("seconds", "cpu_seconds", "started", "device")
    keeps = lambda name: name not in gone and not name.endswith("_per_second")
    return {name: stripped(part) for name, part in value.items() if keeps(name)}


def test_a_suite_that_fails_is_a_sentence_and_the_others_report(run) -> None:
    records = run(("first", "bad", "broken", "absent", "second"))
    status = {name: record["status"] for name, record in records.items()}
    failed = dict.fromkeys(("bad", "broken", "absent"), "failed")
    assert status == {"first": "ok", "second": "ok", **failed}
    assert records["bad"]["why"] == "of no use here"
    why = records["broken"]["why"]
    assert why.startswith("ZeroDivisionError: of no use here; its traceback is in suites/broken-")
    assert "in fails" in (run.directory / why.rpartition(" ")[2]).read_text()
    report = json.loads((run.directory / "report.json").read_text())
    assert report["suites"]["bad"]["why"] == "of no use here"
    assert report["suites"]["second"]["values"]["accuracy"]["n"] == 3
    run(("first", "bad"))
    assert run.ran() == ["first", "second"], "what has failed is tried again, and logs nothing"
    skipped = run(("absent", "bad", "silent"), named=False)
    assert skipped["absent"]["status"] == "skipped" and skipped["bad"]["status"] == "failed"
    assert skipped["silent"]["status"] == "failed", "a server that is gone is no missing part"
    told = run(("first",), why={"first": "no such part"}, named=False, output="other")
    assert told["first"]["status"] == "skipped" and told["first"]["why"] == "no such part"


def test_a_damaged_result_is_measured_again(run) -> None:
    run(("first",))
    (path,) = run.directory.glob("suites/first-*.json")
    path.write_text(path.read_text()[:-50])
    run(("first",))
    assert run.ran() == ["first", "first"] and kept.read(path) is not None


def test_needs_are_checked_before_anything_runs(tmp_path) -> None:
    suite = toy_suites._suite("remote", ready=lambda subject, options: None)
    local = Subject(tmp_path, None, tmp_path)
    remote = Subject(None, None, tmp_path, url="http://nowhere")
    asked = lambda needs, named: [Planned(_needing(suite, needs), toy_suites.Options(), named)]
    assert check_ready(asked("either", True), local) == {}
    with pytest.raises(ValueError, match="needs a model in memory"):
        check_ready(asked("model", True), remote)
    with pytest.raises(ValueError, match="needs a server"):
        check_ready(asked("url", True), local)
    assert "needs a server" in check_ready(asked("url", False), local)["remote"]


def _needing(suite, needs):
    return dataclasses.replace(suite, needs=needs)


def test_rescoring_changes_scores_and_nothing_else(run, monkeypatch) -> None:
    suites = {name: getattr(toy_suites, name.upper()) for name in NAMES}
    monkeypatch.setattr(rescore, "suite_of", suites.__getitem__)
    run()
    before = (run.directory / "report.json").read_bytes()
    files = {p: p.read_bytes() for p in run.directory.glob("suites/*")}
    rescore.rescore(run.directory)
    assert (run.directory / "report.json").read_bytes() == before
    assert {p: p.read_bytes() for p in run.directory.glob("suites/*")} == files
    lines = [json.loads(line) for line in (run.directory / "transcripts.jsonl").open()]
    for line in lines:
        line["answer"] = line["gold"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.directory / "transcripts.jsonl").write_text(text)
    rescore.rescore(run.directory)
    report = json.loads((run.directory / "report.json").read_text())["suites"]
    accuracy = report["second"]["values"]["accuracy"]
    assert accuracy["mean"] == 1 and accuracy["n"] == 3  # the failure of the machinery stays out
    assert report["second"]["counts"]["infra_errors"] == 1
    assert run.ran() == list(NAMES)
    with pytest.raises(ValueError, match="holds no report.json"):
        rescore.rescore(run.directory / "suites")
