"""Curves with their bands as images, and the numbers of each beside it."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_jax.evaluation.kept import write_json
from nemotron_jax.files import atomic_writer

COLOUR = "tab:blue"  # of the evaluated model in every plot
MOST_MARKED = 40  # points of a curve; more would hide it


def draw(plot: Mapping[str, Any], path: Path) -> None:
    """A `Plot`, as the JSON values of one, as an image; its numbers beside it as JSON."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(plot["curves"].items()):
        colour = COLOUR if name == "model" else f"C{number + 1}"
        line = "o-" if len(points) < MOST_MARKED else "-"
        axes.plot([p[0] for p in points], [p[1] for p in points], line, ms=4, label=name, c=colour)
        if banded := [p for p in points if len(p) == 4 and None not in p[2:]]:
            x, _, low, high = zip(*banded, strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    for name, level in plot["baselines"].items():
        axes.axhline(level, color="grey", ls="--", label=name)
    if plot["log_x"]:
        axes.set_xscale("log", base=2)
    axes.set(xlabel=plot["x_label"], ylabel=plot["y_label"], title=plot["title"])
    axes.grid(alpha=0.3)
    if plot["curves"] or plot["baselines"]:
        axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    with atomic_writer(path) as out:
        out.write(image.getvalue())
    write_json(path.with_suffix(".json"), plot)
