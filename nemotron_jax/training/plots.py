"""The loss curve of a run, and the numbers it shows."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.data.atomic import atomic_writer

FOLDER = "plots"


def draw_loss(records: Sequence[dict[str, Any]], run_directory: Path) -> Path:
    """plots/loss.png of the records of metrics.jsonl, with its data in plots/loss.json.

    Training and held-out loss over tokens; the entropy of single tokens is the line that a model
    which knows their frequencies alone would reach.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    shown = {
        "training loss": _curve(records, "loss"),
        "held-out loss": _curve(records, "held_out_loss"),
    }
    entropies = [record["unigram_entropy"] for record in records if record.get("unigram_entropy")]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), colour in zip(shown.items(), ("tab:blue", "tab:orange"), strict=True):
        marker = "o" if name == "held-out loss" else None
        axes.plot(*zip(*points, strict=True) if points else ((), ()), label=name, color=colour)
        if points and marker:
            axes.plot(*zip(*points, strict=True), marker, color=colour)
    if entropies:
        axes.axhline(entropies[-1], color="grey", ls="--", label="entropy of single tokens")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(run_directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    data = {name: [list(point) for point in points] for name, points in shown.items()}
    data["entropy of single tokens"] = entropies[-1] if entropies else None
    path = run_directory / FOLDER / "loss.png"
    with atomic_writer(path) as out:
        out.write(image.getvalue())
    with atomic_writer(path.with_suffix(".json")) as out:
        out.write(json.dumps({"x": "tokens", "y": "nats per token", **data}, indent=1).encode())
    return path


def _curve(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(r["tokens"], r[name]) for r in records if "tokens" in r and r.get(name) is not None]
