"""A report of suites as JSON, Markdown, HTML and images; every file is whole or absent."""

import dataclasses
import datetime
import hashlib
import html
import importlib.metadata
import io
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nemotron_jax.config.convert import to_json
from nemotron_jax.evaluation.evaluator import Plot, Result, Subject
from nemotron_jax.files import atomic_writer
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import RunDirectory

FORMAT_VERSION = 1
LIBRARIES = ("nemotron-jax", "jax", "jaxlib", "flax", "numpy")
COLOUR = "tab:blue"  # of the evaluated model in every plot
_HTML_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{border:1px solid #bbb;padding:.2em .6em}}
td{{text-align:right}}td:first-child{{text-align:left}}img{{max-width:100%}}</style>
"""


@dataclasses.dataclass(frozen=True)
class SuiteRun:
    """One suite's result and how long it took."""

    result: Result
    wall_s: float


@dataclasses.dataclass(frozen=True)
class _Section:
    """A heading, tables and images: what Markdown and HTML have in common."""

    heading: str
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...]
    images: tuple[tuple[str, str], ...] = ()  # (title, path within the report's directory)


def metadata(model: Nemotron, subject: Subject) -> dict[str, Any]:
    """What a number of the report depends on: model, configuration, checkpoint, device, versions.

    `step` is that of the run's checkpoint that was loaded, of `checkpoint_steps` that there are.
    """
    config, device = subject.config, jax.devices()[0]
    text = None if config is None else to_json(config)
    parameters = flatten(model)
    return {
        "checkpoint": str(subject.checkpoint),
        "step": model.origin and model.origin.step,
        "checkpoint_steps": RunDirectory(subject.checkpoint).steps(),
        "model": {
            "pattern": model.config.pattern,
            "width": model.config.width,
            "parameters": sum(leaf.size for leaf in parameters.values()),
            "dtype": str(parameters["embedding"].dtype),
        },
        "config_sha256": text and hashlib.sha256(text.encode()).hexdigest(),
        "seed": subject.seed,
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: _version(name) for name in LIBRARIES},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_report(directory: Path, facts: Mapping[str, Any], suites: Mapping[str, SuiteRun]) -> Path:
    """report.json, report.md, report.html, transcripts.jsonl and plots/ in `directory`.

    Returns the path of report.json, which is written last. Values that are not finite become null.
    """
    for run in suites.values():
        for plot in run.result.plots:
            draw(plot, directory / "plots" / f"{plot.name}.png")
    sections = [_facts_section(facts, suites), *(_section(*item) for item in suites.items())]
    lines = (
        json.dumps({"suite": name, **transcript}, ensure_ascii=False, allow_nan=False) + "\n"
        for name, run in suites.items()
        for transcript in run.result.transcripts
    )
    _write(directory / "transcripts.jsonl", "".join(lines))
    _write(directory / "report.md", _markdown(sections))
    _write(directory / "report.html", _html(sections))
    record = {
        "format_version": FORMAT_VERSION,
        **facts,
        "suites": {name: _record(run) for name, run in suites.items()},
    }
    path = directory / "report.json"
    _write(path, json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def draw(plot: Plot, path: Path) -> None:
    """The plot as an image, and its numbers beside it as JSON."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(plot.curves.items()):
        colour = COLOUR if name == "model" else f"C{number + 1}"
        axes.plot(*zip(*points, strict=True), "o-", label=name, color=colour)
    for name, level in plot.baselines.items():
        axes.axhline(level, color="grey", ls="--", label=name)
    if plot.log_x:
        axes.set_xscale("log", base=2)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, title=plot.title)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    with atomic_writer(path) as out:
        out.write(image.getvalue())
    _write(path.with_suffix(".json"), json.dumps(_finite(dataclasses.asdict(plot)), indent=1))


def _facts_section(facts: Mapping[str, Any], suites: Mapping[str, SuiteRun]) -> _Section:
    rows = [(name, _cell(value)) for name, value in facts.items()]
    rows += [(f"{name}: wall time", f"{run.wall_s:.1f} s") for name, run in suites.items()]
    return _Section("Evaluation", (("", ("", ""), tuple(rows)),))


def _section(name: str, run: SuiteRun) -> _Section:
    result = run.result
    values = tuple(
        (field, _cell(value), _cell(result.standard_errors.get(field)))
        for field, value in result.values.items()
    )
    tables = [
        (f"n = {result.n} {result.counted}".rstrip(), ("value", "", "standard error"), values)
    ]
    for table in result.tables:
        rows = tuple(tuple(_cell(cell) for cell in row) for row in table.rows)
        tables.append((table.title, table.columns, rows))
    images = tuple((plot.title, f"plots/{plot.name}.png") for plot in result.plots)
    return _Section(name, tuple(tables), images)


def _markdown(sections: list[_Section]) -> str:
    escape = lambda cell: cell.replace("|", "\\|").replace("\n", " ")
    lines = []
    for depth, section in enumerate(sections):
        lines += [f"{'#' if depth == 0 else '##'} {section.heading}", ""]
        for title, columns, rows in section.tables:
            lines += [title, ""] if title else []
            lines += [f"| {' | '.join(map(escape, columns))} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(map(escape, row))} |" for row in rows] + [""]
        for title, path in section.images:
            lines += [f"![{title}]({path})", ""]
    return "\n".join(lines)


def _html(sections: list[_Section]) -> str:
    escape = html.escape
    parts = [_HTML_HEAD.format(title=escape(sections[0].heading))]
    for depth, section in enumerate(sections):
        level = 1 if depth == 0 else 2
        parts.append(f"<h{level}>{escape(section.heading)}</h{level}>\n")
        for title, columns, rows in section.tables:
            head = "".join(f"<th>{escape(column)}</th>" for column in columns)
            body = "".join(
                f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
            )
            parts.append(f"<p>{escape(title)}</p>\n<table>\n<tr>{head}</tr>\n{body}</table>\n")
        for title, path in section.images:
            parts.append(f'<p><img src="{escape(path)}" alt="{escape(title)}"></p>\n')
    return "".join(parts) + "</html>\n"


def _record(run: SuiteRun) -> dict[str, Any]:
    result = run.result
    return {
        "values": result.values,
        "standard_errors": result.standard_errors,
        "n": result.n,
        "n_counts": result.counted,
        "wall_s": run.wall_s,
        "tables": [dataclasses.asdict(table) for table in result.tables],
        "plots": [f"plots/{plot.name}.png" for plot in result.plots],
        "transcripts": len(result.transcripts),
    }


def _cell(value: Any) -> str:
    """Four significant digits of a number; integers whole; nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not known"
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    with atomic_writer(path) as out:
        out.write(text.encode())
