"""The script for a first person with a TPU runs here too, its kernels interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.device import kernels

SCRIPT = Path(__file__).with_name("tpu.sh")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.more
def test_the_script_checks_every_kernel_and_trains_ten_steps(tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"), "--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["format"], report["mode"]) == ("nemotron_jax.device", "interpreted")
    kernels = {row["kernel"].partition(",")[0] for row in report["checks"]}
    assert {"ssd_scan", "attention", "causal_conv1d", "grouped_mlp", "nvfp4"} < kernels
    assert all(row["holds"] for row in report["checks"]) and report["train"]["steps"] == 10
    assert report["times"] == [] and "nothing was timed" in done.stdout


def test_a_wrong_kernel_fails(monkeypatch) -> None:
    def op(x, *, implementation: str):
        return x * (1.02 if implementation == kernels.KERNEL else 1.0)

    wrong = [("wrong", op, {"x": np.ones((2, 3), np.float32)}, ("output",))]
    monkeypatch.setattr(kernels, "checks", lambda interpreted: iter(wrong))
    monkeypatch.setattr(kernels, "_of_codes", lambda interpreted: iter(()))
    (row,) = kernels.checked(interpreted=False)
    assert not row["holds"] and row["error"] == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("arguments", [(), ("--interpret",)])
def test_without_a_folder_it_says_how_it_is_called(arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage:") and not done.stdout
