"""A report made again of its transcripts: answers are scored anew, and nothing is generated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_jax.config.untrusted import read_object
from nemotron_jax.evaluation import kept
from nemotron_jax.evaluation.report import REPORT, TRANSCRIPTS, write_report
from nemotron_jax.evaluation.suite import Result, Suite, Unavailable
from nemotron_jax.evaluation.suites import suite_of
from nemotron_jax.evaluation.transcripts import Line, read_lines, scored, write_lines

_HINT = "name the --output of an evaluation"
_OF_REPORT = ("format", "format_version", "suites")


def rescore(directory: Path) -> Path:
    """Rewrite scores and report of a directory from its transcripts; the path of report.json.

    Suites without transcripts stay as they are, and so do an untrained model's means. Raises
    ValueError for a directory without a report.
    """
    if not (directory / REPORT).exists():
        raise ValueError(f"rescore: {directory} holds no {REPORT}; {_HINT}")
    report = read_object(directory / REPORT, _HINT)
    lines = read_lines(directory / TRANSCRIPTS)
    records, abouts, rest = {}, {}, []
    for name, public in report["suites"].items():
        suite = suite_of(name)
        abouts[name] = suite.about
        own = [line for line in lines if line.get("suite") == name]
        path = directory / "suites" / str(public.get("kept") or "none")
        record = kept.read(path)
        if record is None:  # it failed, or was skipped
            records[name] = {**kept.record_of(Result({})), **public, "values": {}, "plots": []}
            continue
        if suite.summarise is not None and own:
            own = [_again(suite, line) for line in own]
            record = _summarised(suite, record, own)
            write_lines(path.with_suffix(".jsonl"), own)
            kept.write_json(path, record)
        records[name] = record
        rest += own
    facts = {name: value for name, value in report.items() if name not in _OF_REPORT}
    return write_report(directory, facts, records, abouts, rest)


def _again(suite: Suite, line: Line) -> Line:
    """The line with the score that its answer has now; a failure of the machinery stays one."""
    try:
        return scored(suite, line)
    except Unavailable as error:
        return line | {"score": None, "reason": str(error), "answered": False}


def _summarised(suite: Suite, record: kept.Record, lines: list[Line]) -> kept.Record:
    options = suite.options(**{name: _tuples(v) for name, v in record["options"].items()})
    found = kept.record_of(suite.summarise(lines, options))
    for name, value in found["values"].items():
        before: Mapping[str, Any] = record["values"].get(name, {})
        value["untrained"] = before.get("untrained")
    return record | found


def _tuples(value: Any) -> Any:
    """Options as they were: JSON has lists for tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
