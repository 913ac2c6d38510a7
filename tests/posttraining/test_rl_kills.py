"""Reinforcement learning that is killed at any step is in the end the run that was never killed."""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from nemotron_jax.posttraining.transcripts import read_transcripts
from tests.posttraining.kill_config import GENERATIONS, PROMPTS, STEPS
from tests.training.runs import comparable

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests/posttraining/kill_config.py"
CLIPPED = "--config.rl.objective.ratio=clipped"
KINDS = {
    "synchronous": [],
    "two_updates": ["--config.rl.updates=2", CLIPPED, "--config.logging.checkpoint_every=1"],
    "asynchronous": ["--config.rl.max_age=1"],
}
KILLS, LONGEST_WAIT_S = 3, 0.2  # a step takes a tenth of a second, or more on a busy machine


def start(workdir, flags):
    command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)


def finish(process):
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 0, output


def children(pid: int) -> list[int]:
    """Processes that it started, theirs included."""
    found = []
    for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return ") Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_for(process, log, steps: int) -> None:
    """Until the run has written that many more steps."""
    before = len(lines(log))
    while process.poll() is None and len(lines(log)) < before + steps:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]


def interrupt(process, log) -> None:
    """Stop the run as Ctrl-C does in a terminal, which reaches its workers too."""
    wait_for(process, log, 1)
    os.killpg(process.pid, signal.SIGINT)
    finish(process)
    assert 0 < len(lines(log)) < STEPS


def kill_after(process, log, steps: int, wait_s: float) -> None:
    """Kill the run when it has written that many more steps, and a moment; its workers end too."""
    wait_for(process, log, steps)
    time.sleep(wait_s)
    assert process.poll() is None, process.communicate()[0]
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert workers
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)


def lines(log) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def in_flight(workdir) -> dict[int, list[list[dict]]]:
    """By batch, the messages so far of the episodes that the newest checkpoint has begun."""
    newest = sorted((workdir / "grpo/checkpoints").glob("step_*/state.json"))[-1:]
    data = json.loads(newest[0].read_text())["data"] if newest else {}
    playing = data.get("in_flight")
    return {data["step"]: [one["messages"] for one in playing["episodes"]]} if playing else {}


def told(workdir) -> tuple[list[dict], list[dict], dict]:
    """Records, episodes and result of a run, without what the clock says."""
    records = [json.loads(line) for line in lines(workdir / "grpo/metrics.jsonl")]
    names = ("reward", "surprise", "mismatch", "age", "infra_errors", "success")
    own = [{name: record.get(name) for name in names} for record in records]
    kept = [one | two for one, two in zip(comparable(records), own, strict=True)]
    result = json.loads((workdir / "result.json").read_text())
    result = {name: value for name, value in result.items() if "seconds" not in name}
    return kept, read_transcripts(workdir / "grpo/transcripts.jsonl"), result


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds workers in /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_and_killed_counts_every_rollout_once(tmp_path, kind) -> None:
    generator, begun = random.Random(kind), {}
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", KINDS[kind]
    finish(start(whole, flags))
    log = cut / "grpo/metrics.jsonl"
    interrupt(start(cut, flags), log)
    begun |= in_flight(cut)
    for _ in range(KILLS):
        wait_s = generator.uniform(0, LONGEST_WAIT_S)
        kill_after(start(cut, flags), log, generator.randint(1, 2), wait_s)
        begun |= in_flight(cut)
    finish(start(cut, flags))
    (records, episodes, result), (cut_records, cut_episodes, cut_result) = told(whole), told(cut)
    assert [record["step"] for record in cut_records] == list(range(1, STEPS + 1))
    batches = STEPS // (2 if kind == "two_updates" else 1)
    of_batches = [number for number in range(batches) for _ in range(PROMPTS * GENERATIONS)]
    assert [episode["batch"] for episode in cut_episodes] == of_batches
    assert any(record["grad_norm"] > 0 for record in records)
    assert [e["task"] for e in cut_episodes] == [e["task"] for e in episodes]
    if kind != "asynchronous":  # bit for bit
        assert not begun
        assert cut_records == records and cut_episodes == episodes and cut_result == result
        return
    # What was in flight is read into a new cache by newer weights, so later draws may differ.
    assert [record["age"] for record in cut_records] == [0, *[1.0] * (STEPS - 1)]
    assert all(math.isfinite(record["loss"]) for record in cut_records)
    versions = [[turn["version"] for turn in episode["turns"]] for episode in cut_episodes]
    for batch, played in zip(of_batches, versions, strict=True):
        assert played[0] == max(batch - 1, 0) and set(played[1:]) <= {batch}
    assert begun and any(len(played) > 1 for played in versions)
    for batch, conversations in begun.items():  # nothing of them is played again
        of_batch = [e["messages"] for e in cut_episodes if e["batch"] == batch]
        for before, after in zip(conversations, of_batch, strict=True):
            assert after[: len(before)] == before
