"""The curves of a run, and the numbers that they show."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import RunDirectory

LOSS, REWARD = "loss.png", "reward.png"

Points = list[tuple[int, float]]
# A smoothed value is the mean of the points around it: a twentieth of the curve to each side, so
# that a run's shape shows and a single batch does not. Few points are shown as they are.
_NEIGHBOURS, _FEWEST_SMOOTHED = 0.05, 20


def draw_curves(records: Sequence[dict[str, Any]], directory: RunDirectory) -> Path:
    """The picture of the records of metrics.jsonl: of what is earned where something is, else of
    the loss."""
    earns = any("reward" in record for record in records)
    return (draw_reward if earns else draw_loss)(records, directory)


def draw_loss(records: Sequence[dict[str, Any]], directory: RunDirectory) -> Path:
    """plots/loss.png, with its data in plots/loss.json.

    Training and held-out loss over tokens; the entropy of single tokens is the line that a model
    which knows their frequencies alone would reach.
    """
    shown = {
        "training loss": _curve(records, "tokens", "loss"),
        "held-out loss": _curve(records, "tokens", "held_out_loss"),
    }
    entropies = [record["unigram_entropy"] for record in records if record.get("unigram_entropy")]
    figure, (axes,) = _figure(directory.path.absolute().name, rows=1)
    _draw(axes, shown, marked="held-out loss")
    if entropies:
        axes.axhline(entropies[-1], color="grey", ls="--", label="entropy of single tokens")
    _describe(axes, "tokens", "loss (nats per token)")
    data = {"x": "tokens", "y": "nats per token", **shown}
    data["entropy of single tokens"] = entropies[-1] if entropies else None
    return _write(figure, directory.plots / LOSS, data)


def draw_reward(records: Sequence[dict[str, Any]], directory: RunDirectory) -> Path:
    """plots/reward.png, with its data in plots/reward.json.

    Above what the episodes of each step earned and held-out success; below the loss of the policy
    gradient, whose slope alone means something: its height is no measure of what was learned.
    """
    steps = "optimizer steps"
    earned = {
        "mean reward of a batch": _curve(records, "step", "reward"),
        "held-out success": _curve(records, "step", "success"),
    }
    surrogate = {"policy-gradient surrogate": _curve(records, "step", "loss")}
    figure, (above, below) = _figure(directory.path.absolute().name, rows=2)
    _draw(above, earned, marked="held-out success")
    _describe(above, steps, "reward")
    _draw(below, surrogate)
    _describe(below, steps, "surrogate loss")
    data = {"x": steps, "y": "reward", **earned, **surrogate}
    return _write(figure, directory.plots / REWARD, data)


def _figure(title: str, rows: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=[2, 1][:rows])[:, 0]
    axes[0].set_title(title)
    return figure, axes


def _draw(axes: Any, curves: Mapping[str, Points], marked: str = "") -> None:
    """The curves that have points, each in its own colour whatever the others have."""
    colours = dict(zip(curves, ("tab:blue", "tab:orange"), strict=False))
    for name, points in curves.items():
        if not points:
            continue
        places, values = zip(*points, strict=True)
        if name == marked or len(points) < _FEWEST_SMOOTHED:
            marker = "o" if name == marked else None
            axes.plot(places, values, marker=marker, label=name, color=colours[name])
            continue
        axes.plot(places, values, color=colours[name], alpha=0.3, lw=1)
        label = f"{name}, smoothed over the raw"
        axes.plot(places, smoothed(values), label=label, color=colours[name])


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean around each value; near the ends as many to either side as there are."""
    most = math.ceil(_NEIGHBOURS * len(values))
    reach = [min(most, place, len(values) - 1 - place) for place in range(len(values))]
    return [fmean(values[i - n : i + n + 1]) for i, n in enumerate(reach)]


def _describe(axes: Any, x: str, y: str) -> None:
    from matplotlib.ticker import EngFormatter

    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _write(figure: Any, path: Path, data: Mapping[str, Any]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    with atomic_writer(path) as out:
        out.write(image.getvalue())
    with atomic_writer(path.with_suffix(".json")) as out:
        out.write(json.dumps(data, indent=1).encode())
    return path


def _curve(records: Sequence[dict[str, Any]], x: str, y: str) -> Points:
    return [(r[x], r[y]) for r in records if x in r and r.get(y) is not None]
