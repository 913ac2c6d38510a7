"""However one of two processes ends, the other ends too, and the run goes on without a loss."""

import json
import pathlib
import random
import re
import signal
import subprocess
import time

import pytest

from nemotron_jax.launch import launch
from tests.training.kill_config import STEPS
from tests.training.runs import comparable

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests/training/kill_config.py"
ENDS_WITHIN_S = 60


class Pair:
    """Two processes of the kill tests' run."""

    def __init__(self, texts, workdir, *flags):
        self.workdir = workdir
        command = ["train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
        command += ["--config.mesh.data=2", f"--config.data.sources=('hf:{texts}',)", *flags]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.processes = launch(command, 2, cwd=ROOT, **options)

    def wait_for_records(self, more, checkpoint=True):
        """Until so many more steps are logged and there is a checkpoint."""
        log, begun = self.workdir / "metrics.jsonl", None
        while all(process.poll() is None for process in self.processes):
            there = len(log.read_bytes().splitlines()) if log.exists() else 0
            begun = there if begun is None else min(begun, there)
            if there >= begun + more and (not checkpoint or newest(self.workdir)):
                return
            time.sleep(0.01)
        raise AssertionError(f"a process ended before: {self.end()}")

    def kill(self, number):
        """Kill one; what the other says, and its status, within a minute."""
        victim, other = self.processes[number], self.processes[1 - number]
        victim.send_signal(signal.SIGKILL)
        output, _ = other.communicate(timeout=ENDS_WITHIN_S)
        victim.communicate()
        return other.returncode, output

    def end(self):
        """Status and output of both."""
        outputs = [process.communicate(timeout=600)[0] for process in self.processes]
        return [process.returncode for process in self.processes], outputs


def newest(workdir):
    return max((path.name for path in (workdir / "checkpoints").glob("step_*[0-9]")), default="")


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return comparable([json.loads(line) for line in lines])


def check_last_words(found, workdir):
    status, output = found
    said = output.strip().splitlines()[-1]
    pattern = (
        r"train.py: another process of this run ended; start all of them again: (step_\d+) is whole"
    )
    assert status == 1 and (match := re.fullmatch(pattern, said)), output
    assert (workdir / "checkpoints" / match[1] / "manifest.json").exists()
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def reference(texts, tmp_path_factory):
    """The records of two processes that were never stopped."""
    workdir = tmp_path_factory.mktemp("never_stopped")
    statuses, outputs = Pair(texts, workdir).end()
    assert statuses == [0, 0], outputs
    assert [record["step"] for record in records(workdir)] == list(range(1, STEPS + 1))
    return records(workdir)


@pytest.mark.more
def test_a_signal_stops_both_and_a_kill_ends_both(texts, tmp_path, reference):
    pair = Pair(texts, tmp_path)
    pair.wait_for_records(4, checkpoint=False)
    pair.processes[1].send_signal(signal.SIGTERM)
    statuses, outputs = pair.end()
    assert statuses == [0, 0], outputs
    step = int(re.search(r"stopped after step (\d+); saving", outputs[0])[1])
    assert len(records(tmp_path)) == step and newest(tmp_path) == f"step_{step:08d}"
    for victim in (1, 0):
        pair = Pair(texts, tmp_path)
        pair.wait_for_records(3)
        check_last_words(pair.kill(victim), tmp_path)
    statuses, outputs = Pair(texts, tmp_path).end()
    assert statuses == [0, 0], outputs
    assert records(tmp_path) == reference


@pytest.mark.slow
def test_six_kills_lose_nothing(texts, tmp_path, reference):
    generator, seconds = random.Random(3), []
    for victim in generator.sample([0, 0, 0, 1, 1, 1], 6):
        pair = Pair(texts, tmp_path)
        pair.wait_for_records(generator.randint(2, 12))
        time.sleep(generator.uniform(0, 0.4))
        began = time.monotonic()
        check_last_words(pair.kill(victim), tmp_path)
        seconds.append(time.monotonic() - began)
    statuses, outputs = Pair(texts, tmp_path).end()
    assert statuses == [0, 0], outputs
    assert records(tmp_path) == reference
    print("seconds from each kill to the other's end:", [round(s, 1) for s in seconds])


@pytest.mark.more
def test_what_is_started_otherwise_is_refused_by_both(texts, tmp_path):
    """Each is one line and status 2, and nothing is left behind that a right start would meet."""
    pair = Pair(texts, tmp_path, "--config.mesh.data=3", "--config.data.batch_size=3")
    statuses, outputs = pair.end()
    assert statuses == [2, 2]
    for output in outputs:
        last = output.strip().splitlines()[-1]
        assert last.startswith("train.py: --process_count=2: 3 devices of data=3 "), output
        assert "Traceback" not in output
    assert not list(tmp_path.iterdir())
