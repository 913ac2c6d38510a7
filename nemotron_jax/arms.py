"""Runs of reinforcement learning beside their controls: python -m nemotron_jax.arms --config=FILE
--output=DIR.

Two seeds, one run whose rewards are dealt out at random, and one that goes on with fine-tuning
instead. Each arm is a run of train.py in its own directory; what is finished is not run again.
DIR/arms.json holds every finished arm's result and curve, DIR/plots/arms.png shows them.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_jax import command_line
from nemotron_jax.data.json_lines import read_objects
from nemotron_jax.files import atomic_writer
from nemotron_jax.posttraining.result_file import read_result
from nemotron_jax.run_directory import RunDirectory

TRAIN = Path(__file__).parents[1] / "train.py"
REWARDS = "--config.rl.rollout.rewards"
# What each arm changes in the config. The controls begin with the first one's fine-tuning.
ARMS = {
    "seed_0": ["--config.seed=0"],
    "seed_1": ["--config.seed=1"],
    "permuted_rewards": ["--config.seed=0", f"{REWARDS}=permuted"],
    "longer_fine_tuning": ["--config.seed=0", f"{REWARDS}=demonstrations"],
}
FIRST, SHARED = "seed_0", ("permuted_rewards", "longer_fine_tuning")
_COLOURS = dict(zip(ARMS, ("tab:blue", "tab:cyan", "tab:red", "tab:grey"), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and draw what is there; the exit status."""
    parser = argparse.ArgumentParser(prog="nemotron_jax.arms", description=__doc__)
    parser.add_argument("--config", required=True, help="a run of stage grpo with a warm start")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    flags, overrides = parser.parse_known_args(arguments)
    try:
        _check_output(flags.output)
        return _run(flags, overrides)
    except (ValueError, OSError) as error:
        print(f"arms: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    output, status = flags.output, 0
    missing = [arm for arm in flags.arms if read_result(RunDirectory(output / arm).result) is None]
    for arm in missing:
        if status := run_arm(arm, flags.config, output, overrides):
            break
        draw_arms(read_arms(output), output)
    if status or not missing:
        draw_arms(read_arms(output), output)
    return status


def _check_output(output: Path) -> None:
    """Raise ValueError for a directory that could not take what hours of runs would leave."""
    command_line.writable("output", output)
    command_line.writable("output", RunDirectory(output).plots)
    for file in (output / "arms.json", RunDirectory(output).plots / "arms.png"):
        if file.is_dir():
            raise ValueError(f"--output={output}: {file} is a folder and must be a file; move it")


def run_arm(arm: str, config: str, output: Path, overrides: Sequence[str]) -> int:
    """Run one arm to its end, or on to it; train.py's exit status."""
    directory, first = output / arm, RunDirectory(output / FIRST)
    if arm in SHARED and first.result.exists() and not directory.exists():
        partial = output / f".{arm}"  # a copy that was cut short is none
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(first.part("sft").path, RunDirectory(partial).part("sft").path)
        partial.rename(directory)
    flags = [f"--config={config}", f"--workdir={directory}", *ARMS[arm], *overrides]
    environment = {**os.environ, "PYTHONPATH": str(TRAIN.parent)}
    return subprocess.run([sys.executable, str(TRAIN), *flags], env=environment).returncode


def read_arms(output: Path) -> dict[str, dict[str, Any]]:
    """Every finished arm's result, held-out success by step, and mean reward by step."""
    found = {}
    for arm in ARMS:
        if (result := read_result(RunDirectory(output / arm).result)) is None:
            continue
        lines = read_objects(RunDirectory(output / arm).part("grpo").metrics)
        records = [r for _, r in lines if r is not None and isinstance(r.get("step"), int)]
        curve = lambda name, records=records: [
            [r["step"], r[name]] for r in records if isinstance(r.get(name), int | float)
        ]
        success = [[0, result["before"]], *curve("success")]
        if arm == "longer_fine_tuning":  # its evaluations play other tasks
            last = records[-1]["step"] if records else result.get("steps", 0)
            success = [[0, result["before"]], [last, result["after"]]]
        found[arm] = {"result": result, "success": success, "reward": curve("reward")}
    return found


def draw_arms(arms: dict[str, dict[str, Any]], output: Path) -> None:
    """arms.json and plots/arms.png of the finished arms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for arm, values in arms.items():
        steps, success = zip(*values["success"], strict=True)
        label = f"{arm.replace('_', ' ')} (n={values['result']['n']} at the end)"
        axes.plot(steps, success, "o-", color=_COLOURS[arm], label=label)
        axes.plot(steps[-1], values["result"]["after"], "s", color=_COLOURS[arm])
        if values["reward"]:
            axes.plot(*zip(*values["reward"], strict=True), color=_COLOURS[arm], alpha=0.25)
    axes.set_xlabel("optimizer steps after the warm start")
    axes.set_ylabel("held-out success; faint: mean reward of a batch")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    if arms:
        axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    path = RunDirectory(output).plots / "arms.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as out:
        out.write(image.getvalue())
    with atomic_writer(output / "arms.json") as out:
        out.write(json.dumps(arms, indent=1).encode())


if __name__ == "__main__":
    sys.exit(main())
