"""This checkout beside another commit's, by CPU time, call by call in turns.

    python -m tests.benchmarks.paired --other=CHECKOUT [--cases=train_1,engine] [--pairs=8]
        [--rounds=3]

Both sides run `tests/benchmarks/side.py` over their own package with this interpreter: a process
each for a round, which compiles first and then does one call of the case whenever it is asked. A
pair is a call of each, the first in turns, so that whatever else the machine does meets both alike.
CPU time of all threads: other processes count for little.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.cases import Case

ROOT = Path(__file__).parents[2]
# By name: the case, and the devices along data that it runs on.
CASES = {
    "train_1": (Case("train_1", "train", batch=2, length=256, repetitions=0), 1),
    "train_2": (Case("train_2", "train", batch=2, length=256, repetitions=0), 2),
    "prefill": (Case("prefill", "prefill", batch=1, length=512, repetitions=0), 1),
    "generate": (Case("generate", "generate", 8, length=64, new_tokens=64, repetitions=0), 1),
    "engine": (Case("engine", "engine", batch=16, length=64, new_tokens=48, repetitions=0), 1),
    "chat": (Case("chat", "chat", batch=1, length=200, new_tokens=128, repetitions=0), 1),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the arguments say, and print a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.paired", description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of another commit")
    parser.add_argument("--cases", default=",".join(CASES), help="some of these, with commas")
    parser.add_argument("--pairs", type=int, default=8, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args(arguments)
    for name in flags.cases.split(","):
        if name not in CASES:
            parser.error(f"--cases={flags.cases}: each must be one of {', '.join(CASES)}")
        rounds = [paired(name, flags.other, flags.pairs) for _ in range(flags.rounds)]
        print(line(name, rounds), flush=True)
    return 0


def paired(name: str, other: Path, pairs: int) -> list[tuple[float, float]]:
    """CPU seconds of so many calls of this checkout's and the other's, after two that are not
    counted."""
    with side(name, ROOT) as ours, side(name, other) as theirs:
        found = []
        for number in range(-2, pairs):
            first, second = (ours, theirs) if number % 2 else (theirs, ours)
            times = {id(one): call(one) for one in (first, second)}
            if number >= 0:
                found.append((times[id(ours)], times[id(theirs)]))
        return found


@contextlib.contextmanager
def side(name: str, checkout: Path) -> Iterator[subprocess.Popen]:
    """A process of a checkout that waits to be asked."""
    case, devices = CASES[name]
    job = {"case": vars(case), "config": str(ROOT / "tests/benchmarks/config.json")}
    process = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).with_name("side.py")),
            json.dumps(job | {"n": devices}),
        ],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def call(process: subprocess.Popen) -> float:
    """CPU seconds of one call."""
    process.stdin.write("\n")
    process.stdin.flush()
    if not (answer := process.stdout.readline()):
        raise SystemExit(f"paired: {process.args[1]} ended with status {process.wait()}")
    return float(answer)


def line(name: str, rounds: list[list[tuple[float, float]]]) -> str:
    """Of a case: each side's median, and the medians of the ratios of each round and of all."""
    ratios = [[ours / theirs for ours, theirs in pairs] for pairs in rounds]
    every = [pair for pairs in rounds for pair in pairs]
    ours, theirs = (1e3 * statistics.median(pair[which] for pair in every) for which in (0, 1))
    each = ", ".join(f"{statistics.median(one):.3f}" for one in ratios)
    flat = sorted(ratio for one in ratios for ratio in one)
    return (
        f"{name}: {ours:.1f} ms of CPU, the other {theirs:.1f}; of {len(flat)} pairs the ratio's "
        f"median {statistics.median(flat):.3f}, of the rounds {each}; {flat[0]:.3f} to "
        f"{flat[-1]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
