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

LOSS, REWARD, BALANCE, ACCEPTANCE = "loss.png", "reward.png", "router.png", "acceptance.png"

Points = list[tuple[int, float]]
# A smoothed value is the mean of the points around it: a twentieth of the curve to each side, so
# that a run's shape shows and a single batch does not. Few points are shown as they are.
_NEIGHBOURS, FEWEST_SMOOTHED = 0.05, 20


def draw_curves(records: Sequence[dict[str, Any]], directory: RunDirectory) -> Path:
    """The pictures of the records of metrics.jsonl; the path of the first: of what is earned where
    something is, else of the loss. The others are of the router's balance and of the drafts' fate,
    where there are routers and records of drafts."""
    has = lambda test: any(map(test, records))
    if has(lambda record: (record.get("expert_load_max") or 1) > 1):
        draw_balance(records, directory)
    if has(drafts_in):
        draw_acceptance(records, directory)
    return (draw_reward if has(lambda record: "reward" in record) else draw_loss)(
        records, directory
    )


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


def draw_balance(records: Sequence[dict[str, Any]], directory: RunDirectory) -> Path:
    """plots/router.png, with its data in plots/router.json.

    Tokens of an expert over the mean of its layer, of all experts: where the fullest, the emptiest
    and nine tenths of them lie. At 1 every expert of a layer gets as many.
    """
    names = {"max": "fullest expert", "95": "95 % below", "5": "5 % below", "min": "emptiest"}
    shown = {label: _curve(records, "step", f"expert_load_{name}") for name, label in names.items()}
    figure, (axes,) = _figure(directory.path.absolute().name, rows=1)
    for outer, inner, alpha, label in (
        ("fullest expert", "emptiest", 0.2, "all experts"),
        ("95 % below", "5 % below", 0.4, "nine tenths of them"),
    ):
        if shown[outer] and len(shown[outer]) == len(shown[inner]):
            steps, high = zip(*shown[outer], strict=True)
            low = [value for _, value in shown[inner]]
            axes.fill_between(steps, low, high, alpha=alpha, color="tab:blue", lw=0, label=label)
    if shown["fullest expert"]:
        steps, values = zip(*shown["fullest expert"], strict=True)
        axes.plot(steps, smoothed(values), color="tab:blue", label="fullest expert, smoothed")
    axes.axhline(1, color="grey", ls="--", label="even")
    axes.set_ylim(bottom=0)
    _describe(axes, "optimizer steps", "tokens of an expert / its layer's mean")
    return _write(figure, directory.plots / BALANCE, {"x": "steps", "y": "share", **shown})


def draw_acceptance(records: Sequence[dict[str, Any]], directory: RunDirectory) -> Path:
    """plots/acceptance.png, with its data in plots/acceptance.json.

    Tokens that a verification of k drafts gives, at each evaluation that ran the suite of that
    name; 1 is plain decoding.
    """
    names = {name: None for record in records for name in drafts_in(record)}
    shown = {f"k = {name.rpartition('_')[2]}": _curve(records, "step", name) for name in names}
    figure, (axes,) = _figure(directory.path.absolute().name, rows=1)
    for label, points in shown.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1, color="grey", ls="--", label="plain decoding")
    _describe(axes, "optimizer steps", "tokens a verification")
    return _write(figure, directory.plots / ACCEPTANCE, {"x": "steps", "y": "tokens", **shown})


def drafts_in(record: Mapping[str, Any]) -> list[str]:
    """The names of a record's values that say how drafts fared on all texts together."""
    start = "acceptance/mean_length_"
    return [name for name in record if name.startswith(start) and name[len(start) :].isdigit()]


def _figure(title: str, rows: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # half a second to import

    # Margins of its own: a layout that fits itself draws everything twice, at each evaluation.
    figure = Figure(figsize=(8, 5))
    margins = {"left": 0.09, "right": 0.98, "top": 0.94, "bottom": 0.1, "hspace": 0.3}
    ratios = [2, 1][:rows]
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=ratios, gridspec_kw=margins)[:, 0]
    axes[0].set_title(title)
    return figure, axes


def _draw(axes: Any, curves: Mapping[str, Points], marked: str = "") -> None:
    """The curves that have points, each in its own colour whatever the others have."""
    colours = dict(zip(curves, ("tab:blue", "tab:orange"), strict=False))
    for name, points in curves.items():
        if not points:
            continue
        places, values = zip(*points, strict=True)
        if name == marked or len(points) < FEWEST_SMOOTHED:
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
