"""The training step beside another commit's, by CPU time, in turns.

    python -m tests.benchmarks.paired --other=CHECKOUT [--rounds=5] [--devices=1,2]

Both sides run `tests.benchmarks.ours` of their own checkout with this interpreter, one after the
other, the first of a round in turns: what else the machine does meets both. A round's figure is the
best of a process's steps; CPU time of all threads, so that other processes count for little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.cases import Case

ROOT = Path(__file__).parents[2]
CASE = Case("paired", "train", batch=2, length=256, repetitions=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the arguments say, and print a line for each number of devices."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.paired", description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", default="1,2", help="devices along data, with commas")
    flags = parser.parse_args(arguments)
    for devices in map(int, flags.devices.split(",")):
        ratios, best = [], {ROOT: [], flags.other: []}
        for number in range(flags.rounds):
            sides = [ROOT, flags.other]
            for side in sides if number % 2 else reversed(sides):
                best[side].append(cpu_seconds(side, devices))
            ratios.append(best[ROOT][-1] / best[flags.other][-1])
            print(f"  round {number}: {ratios[-1]:.3f}", flush=True)
        print(
            f"data={devices}: {1e3 * min(best[ROOT]):.0f} ms of CPU a step, the other "
            f"{1e3 * min(best[flags.other]):.0f}; ratio of {flags.rounds} pairs, median "
            f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}",
            flush=True,
        )
    return 0


def cpu_seconds(checkout: Path, devices: int) -> float:
    """Of the cheapest step of one process."""
    job = {
        "case": vars(CASE),
        "config": str(ROOT / "tests" / "benchmarks" / "config.json"),
        "threads": 2,
        "execution": {"devices": devices},
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.ours", json.dumps(job)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"paired: {checkout} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])["best_cpu_s"]


if __name__ == "__main__":
    sys.exit(main())
