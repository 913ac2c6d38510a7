"""A page of headings, sentences, tables, texts and pictures, as Markdown and as HTML."""

import base64
import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;
color:#222}table{border-collapse:collapse;margin:.6em 0 1.4em;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.25em .8em;text-align:left;white-space:nowrap}
th{border-bottom:2px solid #999;font-weight:600}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums}td.w{white-space:normal;min-width:14em}caption{text-align:left;
font-weight:600;padding:.3em 0}img{max-width:100%}pre{background:#f6f6f6;padding:.7em;
white-space:pre-wrap;overflow-wrap:anywhere}h2{margin-top:2em;border-bottom:1px solid #ccc}
details{margin:.4em 0}summary{cursor:pointer}.failed{color:#b00}"""

WIDE = 48  # characters of a cell; a column that has more breaks its lines


@dataclasses.dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Sentences:
    """A paragraph, or with `points` one point each."""

    texts: tuple[str, ...]
    points: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table. Cells are shown by `shown`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Quote:
    """A text that is shown as it is, in HTML folded below its title unless it is `open`."""

    title: str
    text: str
    open: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file of the page's directory; HTML holds it whole."""

    title: str
    path: str


Part = Heading | Sentences | Grid | Quote | Picture


def shown(value: Any) -> str:
    """Four significant digits of a number; integers whole; nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not known"
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(parts: Sequence[Part]) -> str:
    """The page as Markdown, which links its pictures."""
    return "\n".join(line for part in parts for line in (*_markdown(part), ""))


def _markdown(part: Part) -> list[str]:
    match part:
        case Heading(text, level):
            return [f"{'#' * level} {text}"]
        case Sentences(texts, points):
            return [f"- {text}" for text in texts] if points else [" ".join(texts)]
        case Grid(title, columns, rows):
            cell = lambda value: shown(value).replace("|", "\\|").replace("\n", " ")
            line = lambda cells: f"| {' | '.join(map(cell, cells))} |"
            numbers = _numeric(rows, len(columns))
            rule = "".join("|---:" if number else "|---" for number in numbers)
            head = [f"**{title}**", ""] if title else []
            return [*head, line(columns), f"{rule}|", *map(line, rows)]
        case Quote(title, text, _):
            fence = "`" * max(3, 1 + max(map(len, _runs(text, "`")), default=0))
            return [f"{title}:", "", fence, text, fence]
        case Picture(title, path):
            return [f"![{title}]({path})"]


def page(title: str, parts: Sequence[Part], directory: Path) -> str:
    """The page as one HTML file; pictures are read from the directory."""
    body = "\n".join(_html(part, directory) for part in parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def _html(part: Part, directory: Path) -> str:
    escape = html.escape
    match part:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Sentences(texts, points):
            if points:
                return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
            return f"<p>{escape(' '.join(texts))}</p>"
        case Grid():
            return _html_table(part)
        case Quote(title, text, is_open):
            start = f"<details{' open' * is_open}><summary>{escape(title)}</summary>"
            return f"{start}<pre>{escape(text)}</pre></details>"
        case Picture(title, path):
            data = base64.b64encode((directory / path).read_bytes()).decode()
            return f'<p><img src="data:image/png;base64,{data}" alt="{escape(title)}"></p>'


def _html_table(grid: Grid) -> str:
    numbers = _numeric(grid.rows, len(grid.columns))
    cells = zip(*grid.rows) if grid.rows else ((),) * len(grid.columns)
    wide = [any(len(shown(cell)) > WIDE for cell in column) for column in cells]
    classes = [
        ' class="n"' if number else ' class="w"' if broad else ""
        for number, broad in zip(numbers, wide, strict=True)
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        marked = zip(classes, cells, strict=True)
        return "".join(f"<{tag}{mark}>{html.escape(shown(c))}</{tag}>" for mark, c in marked)

    rows = "".join(f"<tr>{line('td', row)}</tr>\n" for row in grid.rows)
    caption = f"<caption>{html.escape(grid.title)}</caption>" if grid.title else ""
    return f"<table>{caption}\n<tr>{line('th', grid.columns)}</tr>\n{rows}</table>"


def _numeric(rows: Sequence[Sequence[Any]], width: int) -> list[bool]:
    """Which columns hold numbers alone, and are set flush right."""
    is_number = lambda cell: (
        cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))
    )
    columns = [[row[n] for row in rows] for n in range(width)]
    return [
        all(map(is_number, cells)) and any(cell is not None for cell in cells) for cells in columns
    ]


def _runs(text: str, sign: str) -> list[str]:
    """The runs of one sign in a text."""
    runs, run = [], ""
    for one in text:
        run = run + one if one == sign else ""
        if run:
            runs.append(run)
    return runs
