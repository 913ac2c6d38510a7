"""A report of suites as JSON, Markdown, HTML and images; every file is whole or absent."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.evaluation.document import (
    Grid,
    Heading,
    Part,
    Picture,
    Quote,
    Sentences,
    markdown,
    page,
    shown,
)
from nemotron_jax.evaluation.kept import Record, write_json, write_text
from nemotron_jax.evaluation.plots import draw
from nemotron_jax.evaluation.transcripts import write_lines

FORMAT, FORMAT_VERSION = "nemotron_jax.report", 1
REPORT, TRANSCRIPTS = "report.json", "transcripts.jsonl"
VALUE_COLUMNS = ("value", "mean", "low", "high", "n", "unit", "chance", "untrained")
# What of a value stands in report.json; the rest is kept with the suite's result.
_OF_VALUE = ("mean", "interval", "n", "unit", "chance", "untrained", "better")
_OF_SUITE = ("options", "status", "why", "seconds", "cpu_seconds", "values", "counts", "tables")
_OF_SUITE += ("tables_per_second", "plots", "headline", "says", "kept")
SAMPLES, SAMPLE_CHARACTERS = 3, 1200  # of each suite, and of each text in one


def write_report(
    directory: Path,
    facts: Mapping[str, Any],
    records: Mapping[str, Record],
    abouts: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """report.json, report.md, report.html, transcripts.jsonl and plots/ in `directory`.

    `abouts` says what each suite measures, `lines` are those of transcripts. Returns the path of
    report.json, which is written last.
    """
    for record in records.values():
        for plot in record["plots"]:
            draw(plot, directory / "plots" / f"{plot['name']}.png")
    write_lines(directory / TRANSCRIPTS, lines)
    parts = _parts(facts, records, abouts, lines)
    write_text(directory / "report.md", markdown(parts))
    write_text(directory / "report.html", page(_title(facts), parts, directory))
    report = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **facts,
        "suites": {name: _public(record) for name, record in records.items()},
    }
    write_json(directory / REPORT, report)
    return directory / REPORT


def _public(record: Record) -> Record:
    """A suite's record without what only comparisons need."""
    values = {
        name: {field: value[field] for field in _OF_VALUE}
        for name, value in record["values"].items()
    }
    chosen = {name: record[name] for name in _OF_SUITE if name in record}
    plots = [f"plots/{plot['name']}.png" for plot in record["plots"]]
    return chosen | {"values": values, "plots": plots}


def _title(facts: Mapping[str, Any]) -> str:
    return f"Evaluation of {facts['model']['path_name'] or 'a model'}"


def _parts(
    facts: Mapping[str, Any],
    records: Mapping[str, Record],
    abouts: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
) -> list[Part]:
    parts: list[Part] = [Heading(_title(facts), 1), Sentences((_subject(facts["model"]),))]
    said = [f"{name}: {text}" for name, r in records.items() for text in sentences(r)]
    parts += [Heading("In short"), Sentences(tuple(said), points=True)]
    if samples := _samples(lines):
        parts += [Heading("Samples"), *samples]
    for name, record in records.items():
        parts += _suite_parts(name, record, abouts.get(name, ""))
    rows = [(name, _fact(value)) for name, value in _flat(facts)]
    return [*parts, Heading("What these numbers depend on"), Grid("", ("", ""), rows)]


def _subject(model: Mapping[str, Any]) -> str:
    if model.get("url"):
        return f"The model behind {model['url']}."
    text = f"{model['parameters']:,} parameters in {model['dtype']}, pattern {model['pattern']}"
    step = "" if model.get("step") is None else f", after {model['step']:,} steps of training"
    return f"{text}{step}."


def sentences(record: Record) -> list[str]:
    """What a suite found and whether that is good, in sentences."""
    if record["status"] != "ok":
        return [f"{record['status']}: {record['why']}"]
    found = list(record["says"])
    for name in record["headline"]:
        found.append(_verdict(name, record["values"][name]))
    counts = {k.replace("_", " "): v for k, v in record["counts"].items() if v}
    if counts:
        found.append(f"Beside that: {', '.join(f'{n:,} {name}' for name, n in counts.items())}.")
    return found or ["done."]


def _verdict(name: str, value: Mapping[str, Any]) -> str:
    """A value against chance and against the untrained model."""
    unit = "" if value["unit"] == "share" else f" {value['unit']}".rstrip()
    text = f"{name} is {shown(value['mean'])}{unit}"
    interval = value["interval"]
    if interval is not None:
        text += f" (95 %: {shown(interval[0])} to {shown(interval[1])}, n = {value['n']:,})"
    sign = {"higher": 1, "lower": -1}.get(value["better"], 0)
    judged = []
    for what in ("chance", "untrained"):
        level = value[what]
        if level is None:
            continue
        low, high = interval or (value["mean"], value["mean"])
        better, worse = (low > level, high < level) if sign > 0 else (high < level, low > level)
        word = "better than" if better else "worse than" if worse else "not told from"
        named = "chance" if what == "chance" else "the untrained model"
        judged.append(f"{word} {named} ({shown(level)})" if sign else f"{named}: {shown(level)}")
    return f"{text}{': ' if judged else ''}{' and '.join(judged)}."


def _suite_parts(name: str, record: Record, about: str) -> list[Part]:
    parts: list[Part] = [Heading(name)]
    if about:
        parts.append(Sentences((f"Measures {about}.",)))
    given = ", ".join(
        f"{key} = {shown(value) or 'default'}" for key, value in record["options"].items()
    )
    if given:
        parts.append(Sentences((f"Options: {given}.",)))
    if record["status"] != "ok":
        return [*parts, Sentences((f"{record['status'].capitalize()}: {record['why']}",))]
    rows = []
    for field, value in record["values"].items():
        low, high = value["interval"] or (None, None)
        rest = (value["n"], value["unit"], value["chance"], value["untrained"])
        rows.append((field, value["mean"], low, high, *rest))
    parts.append(Grid("Values, with intervals of 95 %", VALUE_COLUMNS, rows))
    counts = record["counts"]
    parts.append(
        Sentences(
            (
                f"Cut off: {counts['truncated']:,}. Without an answer: {counts['no_answer']:,}. "
                f"Failures of the machinery, left out: {counts['infra_errors']:,}.",
            )
        )
    )
    for table in (*record["tables"], *record["tables_per_second"]):
        parts.append(Grid(table["title"], table["columns"], table["rows"]))
    parts += [Picture(p["title"], f"plots/{p['name']}.png") for p in record["plots"]]
    return parts


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Of each suite a right answer, a wrong one, and more up to SAMPLES."""
    by_suite: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_suite.setdefault(line["suite"], []).append(line)
    parts: list[Part] = []
    for name, own in by_suite.items():
        right = [line for line in own if line["score"] == 1][:1]
        wrong = [line for line in own if line["score"] is not None and line["score"] < 1][:1]
        rest = [line for line in own if line not in right and line not in wrong]
        for line in [*right, *wrong, *rest][:SAMPLES]:
            title = f"{name}, {line['task']}: score {shown(line['score']) or 'none'}"
            parts.append(Quote(title, _conversation(line)))
    return parts


def _conversation(line: Mapping[str, Any]) -> str:
    cut = lambda text: text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} …"
    if "messages" in line:
        *before, last = line["messages"]
        repeats = last.get("content") == line["answer"]  # a conversation may hold its answer
        asked = "\n".join(
            f"{message['role']}: {message.get('content') or message.get('tool_calls')}"
            for message in (before if repeats else line["messages"])
        )
    else:
        asked = str(line["prompt"])
    told = f"{cut(asked)}\n\n→ {cut(line['answer'])}"
    why = f"\n\n{line['reason']}" if line["reason"] else ""
    gold = "" if line["gold"] is None else f"\n\nexpected: {cut(shown(line['gold']))}"
    return f"{told}{gold}{why}"


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        whole = f"{before}{name}".replace("_", " ")
        is_part = isinstance(value, Mapping) and name != "versions"
        rows += _flat(value, f"{before}{name}, ") if is_part else [(whole, value)]
    return rows


def _fact(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else shown(value)
