"""What a run of reinforcement learning has changed, as one picture and the numbers it shows."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import RunDirectory

_HEALTH = {
    "reward": "mean reward",
    "zero_spread": "groups that teach nothing",
    "truncated": "episodes cut off",
    "surprise": "surprise (nats a token)",
}


def draw_result(
    result: dict[str, Any], records: Sequence[dict[str, Any]], directory: RunDirectory
) -> Path:
    """plots/result.png of a run, with its data in plots/result.json.

    `result` is that of result.json, `records` those of metrics.jsonl. Left: held-out success before
    and after by environment, with the 95 % interval of the gain, set at `before`. Middle: held-out
    success at each evaluation; right: the health of the batches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    names = sorted(result["environments"])
    parts = {name: result["environments"][name] for name in names} | {"all": result}
    curves = {name: _curve(records, f"success/{name}") for name in names}
    curves["all"] = _curve(records, "success")
    health = {label: _curve(records, name) for name, label in _HEALTH.items()}
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    _draw_gains(axes[0], parts)
    _draw_curves(axes[1], curves, "held-out success", marker=".")
    _draw_curves(axes[2], health, "of a batch of episodes")
    figure.suptitle(
        f"{directory.path.absolute().name}: n={result['n']} held-out tasks, played once each"
    )
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    path = directory.plots / "result.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as out:
        out.write(image.getvalue())
    data = {"result": result, "success": curves, "health": health}
    with atomic_writer(path.with_suffix(".json")) as out:
        out.write((json.dumps(data, indent=1) + "\n").encode())
    return path


def _draw_gains(axes: Any, parts: dict[str, dict[str, Any]]) -> None:
    """A row for each part: where it was, where it is, and the interval of the gain."""
    for row, part in enumerate(parts.values()):
        low, high = (part["before"] + gain for gain in part["interval"])
        axes.plot([low, high], [row, row], color="tab:blue", alpha=0.3, lw=6)
        axes.plot(part["before"], row, "o", color="grey", label="before" if row == 0 else None)
        axes.plot(part["after"], row, "o", color="tab:blue", label="after" if row == 0 else None)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlabel("held-out success; band: 95 % interval of the gain")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_curves(
    axes: Any, curves: dict[str, list[list[float]]], label: str, marker: str = ""
) -> None:
    shown = {name: points for name, points in curves.items() if points}
    for name, points in shown.items():
        whole = {"color": "black", "lw": 2} if name == "all" else {}
        axes.plot(*zip(*points, strict=True), marker=marker, label=name, **whole)
    axes.set_xlabel("optimizer steps after the start")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize="small")


def _curve(records: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    return [[r["step"], r[name]] for r in records if r.get(name) is not None]
