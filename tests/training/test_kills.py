"""A run killed again and again, at any moment, is in the end the run that was never killed."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.training.kill_config import STEPS
from tests.training.runs import comparable

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests/training/kill_config.py"


def start(texts, workdir, *overrides):
    command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [*overrides, f"--config.data.sources=('hf:{texts}',)"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return comparable([json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def reference(texts, tmp_path_factory):
    """The records of the run that was never killed."""
    workdir = tmp_path_factory.mktemp("never_killed")
    finish(start(texts, workdir))
    return records(workdir)


def wait_for(condition, process):
    """Until the condition holds or the process ends."""
    while process.poll() is None and not condition():
        time.sleep(0.004)


def kill_once(process, workdir, moment, generator):
    """Kill the process at a moment of that kind; whether it was alive until then."""
    log, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    size = log.stat().st_size if log.exists() else 0
    if moment == "saving":
        old = set(checkpoints.glob("*.partial"))
        wait_for(lambda: set(checkpoints.glob("*.partial")) - old, process)
        time.sleep(generator.uniform(0, 0.4))
    elif moment == "training":
        wait_for(lambda: log.exists() and log.stat().st_size > size, process)
        time.sleep(generator.uniform(0, 0.6))
    else:
        time.sleep(generator.uniform(0, 4))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def kill_and_compare(texts, workdir, reference, moments, *overrides):
    generator = random.Random(0)
    saving, steps = 0, len(reference)
    for moment in moments:
        process = start(texts, workdir, *overrides)
        assert kill_once(process, workdir, moment, generator), f"it had ended before: {moment}"
        saving += bool(list((workdir / "checkpoints").glob("*.partial")))
    # What a kill can leave at worst: half a record, and a checkpoint that was being removed.
    with (workdir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 119, "loss": 1.')
    finish(start(texts, workdir, *overrides))
    assert records(workdir) == reference
    assert [record["step"] for record in reference] == list(range(1, steps + 1))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        f"step_{steps - 5:08d}",
        f"step_{steps:08d}",
    ]
    return saving


@pytest.mark.more
def test_killed_twice(texts, tmp_path, reference):
    kill_and_compare(texts, tmp_path, reference, ["saving", "training"])


@pytest.mark.slow
def test_killed_at_twenty_four_moments(texts, tmp_path):
    longer = f"--config.training.steps={4 * STEPS}"  # a quick processor would end before the last
    finish(start(texts, tmp_path / "never_killed", longer))
    reference = records(tmp_path / "never_killed")
    moments = ["starting"] * 4 + ["saving"] * 10 + ["training"] * 10
    random.Random(1).shuffle(moments)
    saving = kill_and_compare(texts, tmp_path / "killed", reference, moments, longer)
    assert saving >= 3  # some did hit a save


@pytest.mark.slow
def test_killed_on_a_mesh_and_gone_on_with_on_others(texts, tmp_path, reference):
    generator = random.Random(2)
    for mesh in ({"data": 2, "fsdp": 1}, {"data": 1, "fsdp": 4}, {"data": 2, "fsdp": 2}):
        overrides = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        process = start(texts, tmp_path, *overrides)
        moment = generator.choice(["saving", "training"])
        assert kill_once(process, tmp_path, moment, generator), f"it had ended before: {moment}"
    finish(start(texts, tmp_path))
    for got, wanted in zip(records(tmp_path), reference, strict=True):
        assert got["step"] == wanted["step"]
        # Rounding differs from mesh to mesh, and a hundred steps let it grow.
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-2)


@pytest.mark.more
def test_sigterm_ends_with_status_zero_and_the_run_goes_on(texts, tmp_path, reference):
    process = start(texts, tmp_path)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), process)
    wait_for(lambda: (tmp_path / "metrics.jsonl").stat().st_size > 0, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "stopped after step" in output
    assert len(records(tmp_path)) < STEPS
    output = finish(start(texts, tmp_path))
    assert "resumed after step" in output and "held-out loss" in output
    assert records(tmp_path) == reference


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.mamba.num_groups=3"], "num_groups=3"),
        (["--config.training.steps=0"], "TrainingConfig.steps=0: must be at least 1"),
        (["--config.model.vocab_size=100"], "vocab_size=100"),
        (["--config.training.step=5"], "unknown config key 'step'"),
        (["--config.trainin.steps=5"], "unknown config key 'trainin'"),
        (["--config.training.steps=many"], "'many'"),
        (["--workdirs=x"], "'workdirs'. Did you mean: workdir"),
        (["more"], "unknown arguments ['more']"),
    ],
)
def test_a_wrong_config_is_one_line_and_status_two(texts, tmp_path, overrides, message):
    process = start(texts, tmp_path, *overrides)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and message in last


def test_a_missing_source_is_one_line_and_status_two(tmp_path):
    process = start(tmp_path / "nowhere", tmp_path / "run")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in output
    assert "nowhere" in output.strip().splitlines()[-1]
