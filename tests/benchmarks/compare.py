"""Speed and memory beside Hugging Face transformers' NemotronH, on this machine's CPU.

    python -m tests.benchmarks.compare                              # ours and the peer's
    python -m tests.benchmarks.compare --no-peer --cases train_8x512
    python -m tests.benchmarks.compare --cases train_8x512 --execution devices=2,remat=full

Every measurement is a fresh process; ours and the peer's alternate, each round gives one ratio a
case, and the table shows the median ratio. Nothing here fails for being slow.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.files import atomic_writer
from tests.benchmarks import scaling
from tests.benchmarks.cases import CASES, DEFAULT_CASES, SCALING_LENGTHS, Case, goal_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("config.json")
NO_PEER = (
    "compare: {} does not run, so ours is measured alone; `make .venv-hf/.installed` makes the "
    "peer's environment (torch and transformers), --peer-python names another one"
)


@dataclasses.dataclass(frozen=True)
class Contest:
    """One case with one way of running ours, and what every round measured."""

    case: Case
    execution: str  # `field=value,…` of Execution; only a training step takes it
    ours: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    peer: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def ratio(self, field: str) -> float | None:
        """Ours over the peer's: the median of the rounds' ratios."""
        ratios = [a[field] / b[field] for a, b in zip(self.ours, self.peer)]
        return statistics.median(ratios) if ratios else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it as Markdown and as JSON."""
    options = _options(arguments)
    peer = None if options.no_peer else _working_python(options.peer_python)
    contests = _contests(options)
    for number in range(options.rounds):
        measured: dict[str, dict[str, Any]] = {}  # the peer's, shared by our variants of a case
        for contest in contests:
            print(f"round {number + 1}: {_name(contest)}", file=sys.stderr, flush=True)
            job = _job(contest.case, options.threads)
            execution = dict(pair.split("=") for pair in contest.execution.split(",") if pair)
            ours = job | {"execution": execution}
            contest.ours.append(_measure(sys.executable, "ours", ours, options))
            if peer:
                name = contest.case.name
                measured[name] = measured.get(name) or _measure(peer, "peer", job, options)
                contest.peer.append(measured[name])
    primitives = {}
    if options.scaling:
        for case in scaling.primitive_cases(SCALING_LENGTHS):
            job = _job(case, options.threads)
            primitives[case.name] = _measure(sys.executable, "ours", job, options)
    report = _report(contests, primitives, options)
    print(report)
    results = {"machine": _machine(options), "primitives": primitives}
    results["contests"] = [dataclasses.asdict(contest) for contest in contests]
    for suffix, text in ((".md", report), (".json", json.dumps(results, indent=1) + "\n")):
        with atomic_writer(options.output.with_suffix(suffix)) as file:
            file.write(text.encode())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", default=",".join(DEFAULT_CASES), help=f"of {', '.join(CASES)}")
    add("--rounds", type=int, default=3, help="measurements of each side, taken in turn")
    add("--threads", type=int, default=os.cpu_count(), help="cores that a measurement may use")
    add(
        "--execution",
        action="append",
        help="field=value,… of Execution, devices=N or precision=nvfp4, for the training step; "
        "repeat to compare",
    )
    add("--scaling", action="store_true", help="how prefill grows with the prompt, by parts")
    add("--no-peer", action="store_true", help="measure ours alone")
    add("--peer-python", default=".venv-hf/bin/python", help="has torch and transformers")
    add("--compilation-cache", default="", help="a folder that keeps compiled programs")
    add("--output", type=Path, default=Path("build/bench/compare"), help="of .md and .json")
    options = parser.parse_args(arguments)
    options.cases = [name for name in options.cases.split(",") if name]
    if options.scaling:
        wanted = [f"prefill_1x{length}" for length in SCALING_LENGTHS]
        options.cases += [name for name in wanted if name not in options.cases]
    for name in options.cases:
        if name not in CASES:
            parser.error(f"--cases={name}: unknown; the cases are {', '.join(CASES)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error(f"--rounds={options.rounds} --threads={options.threads}: at least 1 each")
    return options


def _contests(options: argparse.Namespace) -> list[Contest]:
    contests = []
    for name in options.cases:
        ways = (options.execution or [""]) if CASES[name].kind == "train" else [""]
        contests += [Contest(CASES[name], way) for way in ways]
    return contests


def _job(case: Case, threads: int) -> dict[str, Any]:
    return {"case": dataclasses.asdict(case), "config": str(CONFIG), "threads": threads}


def _measure(
    python: str, worker: str, job: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One fresh process's result; its error output is shown when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A warm cache would hide what compilation costs in memory.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if options.compilation_cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = options.compilation_cache
    command = [python, "-m", f"tests.benchmarks.{worker}", json.dumps(job)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"compare: {worker} failed at {job['case']['name']} (exit {done.returncode}):\n"
            f"{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _working_python(python: str) -> str | None:
    """The peer's interpreter, or None (said aloud) when it lacks the libraries."""
    path = str(ROOT / python) if (ROOT / python).exists() else python
    try:
        check = subprocess.run(
            [path, "-c", "import torch, transformers"], capture_output=True, check=False
        )
        works = check.returncode == 0
    except OSError:
        works = False
    if not works:
        print(NO_PEER.format(python), file=sys.stderr)
    return path if works else None


def _report(
    contests: list[Contest], primitives: dict[str, Any], options: argparse.Namespace
) -> str:
    machine = _machine(options)
    versions = {**contests[0].ours[0]["versions"]}
    if contests[0].peer:
        versions |= contests[0].peer[0]["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# nemotron_jax and transformers NemotronH on a CPU",
        "",
        f"- {machine['processor']}, {options.threads} threads, float32; Python "
        f"{machine['python']}, {named}",
        f"- {contests[0].ours[0]['parameters']:,} parameters ({CONFIG.name}); "
        f"rounds: {options.rounds}; command: `{machine['command']}`",
        "- tokens/s: best repetition of the best round. Ratios are ours over the peer's, the "
        "median of the rounds; CPU: the same of tokens per second of CPU time, which another "
        "process's load disturbs less.",
        "- MB: most memory the process held, imports and compilation included; in brackets what it "
        "held before the first run. others: cores that other processes used meanwhile (ours / "
        "peer's, the worst round).",
        "",
        "| case | ours tokens/s | peer | ratio | CPU | goal | ours MB | peer MB | ratio | goal "
        "| compile s | others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(contest) for contest in contests),
    ]
    if primitives:
        lines += scaling.table(
            {c.case.length: c for c in contests if c.case.kind == "prefill"}, primitives
        )
    return "\n".join(lines) + "\n"


def _row(contest: Contest) -> str:
    goal = goal_of(contest.case, contest.execution)
    both = (contest.ours, contest.peer)
    speed = [_number(rounds, "tokens_per_second", max) for rounds in both]
    memory = [
        f"{_number(rounds, 'peak_mb', max)} ({_number(rounds, 'idle_mb', max)})" for rounds in both
    ]
    others = " / ".join(
        f"{max(each['other_cores'] for each in rounds):.1f}" for rounds in both if rounds
    )
    compile_s = min(
        each.get("compile_s", each["first_run_s"] - each["best_s"]) for each in contest.ours
    )
    cells = [
        _name(contest),
        *speed,
        _ratio(contest.ratio("tokens_per_second")),
        _ratio(contest.ratio("tokens_per_cpu_second")),
        "" if goal.speed is None else f"≥ {goal.speed:g}",
        *memory,
        _ratio(contest.ratio("peak_mb")),
        "" if goal.memory is None else f"≤ {goal.memory:g}",
        f"{compile_s:.1f}",
        others,
    ]
    return "| " + " | ".join(cells) + " |"


def _name(contest: Contest) -> str:
    return " ".join(part for part in (contest.case.name, contest.execution) if part)


def _number(rounds: list[dict[str, Any]], field: str, best: Any) -> str:
    return f"{best(each[field] for each in rounds):,.0f}" if rounds else "–"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "python": platform.python_version(),
        "command": " ".join(["python -m tests.benchmarks.compare", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    main()
