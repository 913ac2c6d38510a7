"""Runs of an experiment's arms, each in a process of its own and none twice, and what they show.

    OUTPUT/evidence.json               every finished run, arms compared with each other
    OUTPUT/plots/NAME.png              the runs' curves, seeds of an arm in one colour
    OUTPUT/runs/v1/ARM-0/              the directory of a run, and measured.json once it is finished

A run is known by experiment, arm, seed and the experiment's version: a change that makes other runs
raises the version, and no run of an older one counts.
"""

import argparse
import dataclasses
import importlib.metadata
import io
import json
import math
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax import command_line
from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
QUICK = "_quick"  # ends the name of an experiment of a few steps
STOPPED = 3  # exit status of a run that a signal stopped before its end
LEVEL = 0.95  # of the intervals
# Student's t at that level by degrees of freedom; beyond the last, the normal's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one run came to; `curve` holds [step, value] of the experiment's metric."""

    steps: int
    curve: list[list[float]]
    final: float
    n_tokens: int  # that were learned from
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of running; `run` brings a run to its end, and gives None where a signal stopped it.

    It is given the seed, its own directory, and that of a finished run of the arm `after`, if it
    names one, with the same seed.
    """

    run: Callable[[int, Path, Path | None], Measured | None]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # said in the evidence
    after: str = ""
    most_seeds: int | None = None  # of the experiment's seeds; all by default


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Arms and what they are compared by."""

    name: str
    version: int
    metric: str
    arms: Mapping[str, Arm]
    against: str  # the arm that the others are compared with
    seeds: tuple[int, ...]
    relative: bool = False  # whether differences are divided by the value of `against`
    noise_floor: str = ""  # an arm that differs from `against` by chance alone
    positive_control: str = ""  # an arm whose difference must be seen
    also_against: str = ""  # another arm that the others are compared with


def main(
    experiment: Experiment,
    quick: Experiment | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run what is missing and write down what is there; the exit status.

    With `--quick` it is `quick` that is run: the same arms of a few steps, which shows that they
    work and nothing else.
    """
    flags = _parser(experiment, quick).parse_args(arguments)
    if quick is not None and flags.quick:
        experiment = quick
        flags = _parser(experiment, quick).parse_args(arguments)
    try:
        _check_output(flags.output, experiment)
        if flags.run:
            arm, _, seed = flags.run.rpartition(":")
            return run_one(experiment, flags.output, arm, int(seed))
        return _run_missing(experiment, flags)
    except (ValueError, OSError) as error:
        print(f"{experiment.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser(experiment: Experiment, quick: Experiment | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"experiments.{experiment.name}")
    parser.add_argument("--output", type=Path, default=Path("docs/evidence") / experiment.name)
    parser.add_argument("--arms", type=_words, default=list(experiment.arms), help="a,b,…")
    parser.add_argument("--seeds", type=_numbers, default=list(experiment.seeds), help="0,1,…")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help="arms of a few steps")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)  # one run, in this process
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _check_output(output: Path, experiment: Experiment) -> None:
    """Raise ValueError for a directory that could not take what hours of runs would leave."""
    command_line.writable("output", output)
    command_line.writable("output", _plot(output, experiment).parent)
    for file in (_evidence(output), _plot(output, experiment)):
        if file.is_dir():
            raise ValueError(f"--output={output}: {file} is a folder and must be a file; move it")


def _run_missing(experiment: Experiment, flags: argparse.Namespace) -> int:
    if unknown := [arm for arm in flags.arms if arm not in experiment.arms]:
        raise ValueError(
            f"--arms={','.join(flags.arms)}: there is no {unknown[0]!r}; choose from "
            f"{', '.join(experiment.arms)}"
        )
    status = 0
    for arm, seed in _asked(experiment, flags.arms, flags.seeds):
        if (arm, seed) not in read_runs(experiment, flags.output):
            status = _start(experiment, flags.output, arm, seed)
        if status:
            break
    write_evidence(experiment, flags.output)
    return status


def _asked(
    experiment: Experiment, arms: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """The runs that are asked for; of the experiment's seeds an arm takes the first few."""
    for seed in seeds:
        for arm in _in_order(experiment, arms):
            enough = experiment.seeds[experiment.arms[arm].most_seeds :]
            if experiment.arms[arm].most_seeds is None or seed not in enough:
                yield arm, seed


def _in_order(experiment: Experiment, arms: Sequence[str]) -> list[str]:
    """Arms with those before them that they go on from."""
    ordered: list[str] = []
    for arm in arms:
        after = experiment.arms[arm].after
        ordered += [name for name in (after, arm) if name and name not in ordered]
    return ordered


def _start(experiment: Experiment, output: Path, arm: str, seed: int) -> int:
    """One run in a process of its own, whose memory and devices no other has used."""
    name = experiment.name.removesuffix(QUICK)
    command = [sys.executable, "-m", f"experiments.{name}"]
    command += ["--quick"] if name != experiment.name else []
    command += [f"--output={output.absolute()}", f"--run={arm}:{seed}"]
    return subprocess.run(command, cwd=ROOT).returncode


def run_one(experiment: Experiment, output: Path, arm: str, seed: int) -> int:
    """Run one arm with one seed to its end, or on to it; the exit status."""
    directory = run_directory(experiment, output, arm, seed)
    chosen = experiment.arms[arm]
    before = run_directory(experiment, output, chosen.after, seed) if chosen.after else None
    found = chosen.run(seed, directory, before)
    if found is None:
        return STOPPED
    import jax

    device, used = jax.devices()[0], resource.getrusage(resource.RUSAGE_SELF)
    values = {
        **_key(experiment, arm, seed),
        "overrides": dict(chosen.overrides),
        **dataclasses.asdict(found),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
    }
    _write(directory / "measured.json", values)
    return 0


def run_directory(experiment: Experiment, output: Path, arm: str, seed: int) -> Path:
    """Where a run of the experiment's version is."""
    return output / "runs" / f"v{experiment.version}" / f"{arm}-{seed}"


def _key(experiment: Experiment, arm: str, seed: int) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "experiment_version": experiment.version,
        "arm": arm,
        "seed": seed,
    }


def read_runs(experiment: Experiment, output: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Every finished run by arm and seed: of the evidence, and of those directories that are there.

    One that is damaged is not finished.
    """
    kept = _read(_evidence(output))
    same = kept.get("experiment_version") == experiment.version
    listed = kept.get("runs") if same else []
    found = [run for run in listed if isinstance(run, dict)] if isinstance(listed, list) else []
    folder = run_directory(experiment, output, "", 0).parent
    found += [_read(file) for file in sorted(folder.glob("*/measured.json"))]
    runs = {}
    for run in found:
        whole = {"experiment", "experiment_version", "arm", "seed", "curve", "final"} <= run.keys()
        if whole and run["arm"] in experiment.arms:
            if _key(experiment, run["arm"], run["seed"]).items() <= run.items():
                runs[run["arm"], run["seed"]] = run
    order = list(experiment.arms)
    return dict(sorted(runs.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def write_evidence(experiment: Experiment, output: Path) -> None:
    """evidence.json and the picture of what is finished."""
    runs = read_runs(experiment, output)
    found, file = evidence(experiment, list(runs.values())), _evidence(output)
    before = _read(file)
    if before.get("runs") == found["runs"]:  # another commit made none of them
        found["commit"] = before.get("commit", found["commit"])
    _write(file, found)
    draw(experiment, list(runs.values()), _plot(output, experiment))


def evidence(experiment: Experiment, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What finished runs show: each arm against the one that it is compared with, seed by seed."""
    entries = _comparisons(experiment, runs, experiment.against)
    compared = {
        entry["arm"]: {name: entry[name] for name in ("mean", "interval", "n")} for entry in entries
    }
    floor, control = experiment.noise_floor, compared.get(experiment.positive_control)
    interval = control and control["interval"]
    return {
        "format": "nemotron_jax.evidence",
        "format_version": 1,
        "experiment": experiment.name,
        "experiment_version": experiment.version,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", f"experiments.{experiment.name}"]),
        "device": runs[-1]["device"] if runs else "",
        "versions": runs[-1]["versions"] if runs else {},
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        "runs": [dict(run) for run in runs],
        "comparisons": entries,
        **_also_compared(experiment, runs),
        "noise_floor": {"arm": floor, **compared[floor]} if floor in compared else None,
        "positive_control": {
            "arm": experiment.positive_control,
            "detected": bool(interval and (interval[0] > 0 or interval[1] < 0)),
        },
    }


def _also_compared(experiment: Experiment, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arms against the second one, for an experiment that has it."""
    other = experiment.also_against
    return {"also_compared": _comparisons(experiment, runs, other)} if other else {}


def _comparisons(
    experiment: Experiment, runs: Sequence[Mapping[str, Any]], against: str
) -> list[dict[str, Any]]:
    """Every other arm against this one, over the seeds that both have."""
    finals = {(run["arm"], run["seed"]): run["final"] for run in runs}
    entries = []
    for arm in experiment.arms:
        seeds = [s for name, s in finals if name == arm and (against, s) in finals]
        if arm == against or not seeds:
            continue
        base = [finals[against, seed] for seed in seeds]
        gaps = [finals[arm, seed] - value for seed, value in zip(seeds, base, strict=True)]
        if experiment.relative:
            gaps = [gap / value for gap, value in zip(gaps, base, strict=True)]
        entries.append(
            {"arm": arm, "against": against, "metric": experiment.metric}
            | {"relative": experiment.relative, **_mean_and_interval(gaps)}
            | {"level": LEVEL, "unit": "seed", "paired": True}
        )
    return entries


def _mean_and_interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean of values, its interval by Student's t, None of a single one, and their number."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return {"mean": mean, "interval": None, "n": count}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    factor = _T[count - 2] if count - 2 < len(_T) else _NORMAL
    error = factor * math.sqrt(variance / count)
    return {"mean": mean, "interval": [mean - error, mean + error], "n": count}


def draw(experiment: Experiment, runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The runs' curves, the seeds of an arm in one colour, and how far the arms end from the one
    that they are compared with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, differences = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = {arm: f"C{number}" for number, arm in enumerate(experiment.arms)}
    for arm, color in colors.items():
        of_arm = [run for run in runs if run["arm"] == arm]
        for place, run in enumerate(of_arm):
            label = f"{arm.replace('_', ' ')} (n={len(of_arm)})" if place == 0 else None
            points = zip(*run["curve"], strict=True)
            curves.plot(*points, "o-", color=color, label=label, markersize=3, linewidth=1)
    curves.set_xlabel("optimizer steps")
    curves.set_ylabel(experiment.metric.replace("_", " "))
    curves.grid(alpha=0.3)
    if curves.lines:
        curves.legend()
    _draw_differences(differences, experiment, runs, colors)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    with atomic_writer(path) as out:
        out.write(image.getvalue())


def _draw_differences(
    axes: Any,
    experiment: Experiment,
    runs: Sequence[Mapping[str, Any]],
    colors: Mapping[str, str],
) -> None:
    """Each arm's mean difference with its interval, from the top in the arms' order."""
    found = _comparisons(experiment, runs, experiment.against)
    unit = 100 if experiment.relative else 1  # in per cent
    for place, entry in enumerate(found):
        mean = unit * entry["mean"]
        low, high = (unit * bound for bound in entry["interval"] or (entry["mean"],) * 2)
        error = [[mean - low], [high - mean]]
        axes.errorbar(mean, place, xerr=error, fmt="o", color=colors[entry["arm"]], capsize=4)
    axes.set_yticks(range(len(found)), [entry["arm"].replace("_", " ") for entry in found])
    axes.set_ylim(max(len(found), 1) - 0.5, -0.5)
    axes.axvline(0, color="gray", linewidth=1)
    axes.grid(alpha=0.3, axis="x")
    against = experiment.against.replace("_", " ")
    share = " in %" if experiment.relative else ""
    axes.set_xlabel(f"difference from {against}{share}, {LEVEL:.0%} interval over seeds")


def _evidence(output: Path) -> Path:
    return output / "evidence.json"


def _plot(output: Path, experiment: Experiment) -> Path:
    return RunDirectory(output).plots / f"{experiment.name}.png"


def _commit() -> str:
    """The commit that is checked out; empty outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _read(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_writer(path) as out:
        out.write((json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
