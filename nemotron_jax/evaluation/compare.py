"""Two or more reports side by side: which differences are more than chance, item by item."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nemotron_jax.config.checks import check_value, is_finite
from nemotron_jax.config.untrusted import read_object
from nemotron_jax.data.json_lines import read_objects
from nemotron_jax.evaluation import kept
from nemotron_jax.evaluation.document import Grid, Heading, Part, Picture, Sentences, page
from nemotron_jax.evaluation.plots import draw
from nemotron_jax.evaluation.report import REPORT
from nemotron_jax.evaluation.statistics import NORMAL_95, Items
from nemotron_jax.evaluation.suite import Plot
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.plots import FEWEST_SMOOTHED, drafts_in, smoothed

FORMAT, FORMAT_VERSION = "nemotron_jax.compare", 1
LEVEL = 0.05
# Sign flips are tried one and all up to so many items, and drawn at random beyond.
MOST_EXACT, DRAWS = 12, 9_999
# Of runs' records, the curves that are drawn where some run has them, and their axes.
CURVES = {
    "held_out_loss": "held-out loss (nats per token)",
    "success": "held-out tasks solved (share)",
    "reward": "reward of a batch",
    "loss": "loss of a batch",
    "expert_load_max": "fullest expert's tokens / its layer's mean",
}


@dataclasses.dataclass(frozen=True)
class Compared:
    """One metric of two reports. `difference` is b's mean less a's."""

    suite: str
    metric: str
    a: str
    b: str
    a_mean: float
    b_mean: float
    difference: float
    interval: tuple[float, float]
    p: float
    n: int
    paired: bool
    significant: bool


@dataclasses.dataclass(frozen=True)
class Side:
    """A directory: what its report holds by suite, and the records of its run."""

    name: str
    suites: Mapping[str, kept.Record]
    records: Sequence[Mapping[str, Any]]


def compare(directories: Sequence[Path], output: Path, level: float = LEVEL) -> Path:
    """Write compare.json, compare.html and plots/ of reports or runs; the path of the JSON.

    Raises ValueError for fewer than two directories, one that is neither, and a level that is no
    probability.
    """
    ok = is_finite(level) and 0 < level < 1
    check_value("compare", "level", level, ok, "must lie between 0 and 1, as 0.05")
    if len(directories) < 2:
        raise ValueError("compare: needs two directories or more, as in: compare A B --output=DIR")
    sides = [read_side(path, name) for path, name in zip(directories, _names(directories))]
    found, missing = [], []
    for a, b in itertools.combinations(sides, 2):
        pairs, lacking = compare_sides(a, b, level)
        found += pairs
        missing += lacking
    plots = _curves(sides)
    for plot in plots:
        draw(kept.finite(dataclasses.asdict(plot)), output / "plots" / f"{plot.name}.png")
    title = f"{' against '.join(side.name for side in sides)}"
    parts = _parts(title, found, missing, plots, level)
    kept.write_text(output / "compare.html", page(title, parts, output))
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "level": level,
        "pairs": [dataclasses.asdict(one) for one in found],
        "missing": missing,
    }
    kept.write_json(output / "compare.json", record)
    return output / "compare.json"


def read_side(path: Path, name: str) -> Side:
    """What a directory holds. Raises ValueError for one that holds neither a report nor a run."""
    suites, records = {}, []
    hint = "name the --output of an evaluation, or a run's directory"
    if (path / REPORT).exists():
        for suite, record in read_object(path / REPORT, hint)["suites"].items():
            own = kept.read(path / "suites" / str(record.get("kept") or "none"))
            if own is not None and own["status"] == "ok":
                suites[suite] = own
    metrics = RunDirectory(path).metrics
    if metrics.exists():
        records = [record for _, record in read_objects(metrics) if record is not None]
    if not suites and not records:
        raise ValueError(f"compare: {path} holds neither a report nor a run's metrics; {hint}")
    return Side(name, suites, records)


def compare_sides(a: Side, b: Side, level: float) -> tuple[list[Compared], list[dict[str, str]]]:
    """Every metric that both have, and what one of them lacks."""
    found, missing = [], []
    for suite in sorted({*a.suites, *b.suites}):
        mine, theirs = (side.suites.get(suite) for side in (a, b))
        if mine is None or theirs is None:
            lacks = a.name if mine is None else b.name
            missing.append({"suite": suite, "metric": "", "lacks": lacks})
            continue
        for metric in dict.fromkeys([*mine["values"], *theirs["values"]]):
            one, other = (record["values"].get(metric) for record in (mine, theirs))
            if one is None or other is None:
                lacks = a.name if one is None else b.name
                missing.append({"suite": suite, "metric": metric, "lacks": lacks})
            elif one["items"] and other["items"]:
                outcome = difference_of(one["items"], other["items"])
                names = {"suite": suite, "metric": metric, "a": a.name, "b": b.name}
                found.append(Compared(**names, **outcome, significant=outcome["p"] < level))
    return found, missing


def difference_of(a: Items, b: Items) -> dict[str, Any]:
    """The test of one metric: paired by the items that both have, unpaired where they share none.

    Paired: signs of the items' differences are flipped, which is exact where the two are equally
    good (for answers that are right or wrong: McNemar's test). Unpaired: normal, which is right for
    many items.
    """
    common = [item for item in a if item in b]
    if common:
        influences = [_influence({item: side[item] for item in common}) for side in (a, b)]
        (mean_a, of_a), (mean_b, of_b) = influences
        each = (mean_b + of_b) - (mean_a + of_a)
        middle, error = mean_b - mean_a, _standard_error(each)
        p, n = flipped(each), len(common)
    else:
        (mean_a, of_a), (mean_b, of_b) = _influence(a), _influence(b)
        middle = mean_b - mean_a
        error = math.hypot(_standard_error(of_a), _standard_error(of_b))
        p = 1.0 if middle == 0 else math.erfc(abs(middle) / max(error, 1e-300) / math.sqrt(2))
        n = len(a) + len(b)
    half = NORMAL_95 * error
    return {
        "a_mean": mean_a,
        "b_mean": mean_b,
        "difference": middle,
        "interval": (middle - half, middle + half),
        "p": p,
        "n": n,
        "paired": bool(common),
    }


def _influence(items: Items) -> tuple[float, Float[np.ndarray, "n"]]:
    """The mean of items, and how much each moves it, times their number."""
    amounts, sizes = np.array(list(items.values()), np.float64).T
    mean = float(amounts.sum() / sizes.sum())
    return mean, (amounts - mean * sizes) / sizes.mean()


def _standard_error(values: Float[np.ndarray, "n"]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def flipped(differences: Float[np.ndarray, "n"]) -> float:
    """The chance that signs drawn by coin make a mean as far from 0; 1 for differences of 0."""
    values = differences[np.abs(differences) > 1e-12]
    n, seen = len(values), abs(float(values.sum()))
    if not n:
        return 1.0
    seen -= 1e-9 * max(seen, 1e-300)  # the same sum in another order is as far
    if n <= MOST_EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
        return float(np.mean(np.abs(signs @ values) >= seen))
    generator = np.random.default_rng(0)
    further = 0
    for count in _parts_of(DRAWS, 500):
        signs = generator.integers(0, 2, (count, n)) * 2 - 1
        further += int(np.count_nonzero(np.abs(signs @ values) >= seen))
    return (1 + further) / (1 + DRAWS)


def _parts_of(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _names(directories: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    paths = [path.resolve() for path in directories]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path}#{number}" for number, path in enumerate(paths)]


def _curves(sides: Sequence[Side]) -> list[Plot]:
    """Runs' curves in one picture for each kind that some run has, smoothed where they have many
    points; the loss of batches where there is no evaluation."""
    drafts = {name: None for side in sides for record in side.records for name in drafts_in(record)}
    labels = CURVES | {name: f"tokens a verification, k = {name.split('_')[-1]}" for name in drafts}
    plots = []
    for key, label in labels.items():
        curves = {}
        for side in sides:
            has = lambda r, key=key: is_finite(r.get(key)) and is_finite(r.get("tokens"))
            points = [(r["tokens"], r[key]) for r in side.records if has(r)]
            if len(points) >= FEWEST_SMOOTHED:
                places, values = zip(*points, strict=True)
                points = list(zip(places, smoothed(values), strict=True))
                label = f"{labels[key]}, smoothed"
            if points:
                curves[side.name] = tuple(points)
        if not curves or (key == "loss" and plots):
            continue
        name = f"runs_{key.replace('/', '_')}"
        title = labels[key].partition(" (")[0].capitalize()
        plots.append(Plot(name, title, "training tokens", label, curves))
    return plots


def _parts(
    title: str,
    found: Sequence[Compared],
    missing: Sequence[Mapping[str, str]],
    plots: Sequence[Plot],
    level: float,
) -> list[Part]:
    parts: list[Part] = [Heading(title, 1)]
    told = [one for one in found if one.significant]
    said = [
        f"{one.suite}, {one.metric}: {one.a_mean:.4g} in {one.a}, {one.b_mean:.4g} in {one.b} "
        f"(p = {one.p:.2g}, n = {one.n:,})."
        for one in told
    ]
    count = (
        f"{len(told)} of {len(found)} comparisons differ at the level {level:g}; of so many, "
        f"{level * len(found):.1f} would by chance alone."
    )
    if found or missing:
        parts.append(Sentences((count,)))
    elif plots:
        parts.append(Sentences(("The curves of the runs' metrics; none has a report.",)))
    if said:
        parts.append(Sentences(tuple(said), points=True))
    columns = ("suite", "metric", "a", "b", "a's mean", "b's mean", "difference", "low", "high")
    columns += ("p", "n", "paired", "differs")
    rows = [
        (c.suite, c.metric, c.a, c.b, c.a_mean, c.b_mean, c.difference, *c.interval, c.p, c.n)
        + (c.paired, c.significant)
        for c in found
    ]
    if rows:
        parts.append(Grid("Differences, b less a, with intervals of 95 %", columns, rows))
    if missing:
        lacking = [(one["suite"], one["metric"], one["lacks"]) for one in missing]
        parts.append(Grid("Not compared", ("suite", "metric", "lacking in"), lacking))
    return [*parts, *(Picture(plot.title, f"plots/{plot.name}.png") for plot in plots)]
