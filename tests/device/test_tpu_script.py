"""The script for a first person with a TPU runs here too, its kernels interpreted."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import prove
from pallas_kernels.devices import DEVICES
from pallas_kernels.grouped_matmul import proofs
from tests.device import kernels, tpu

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
    named = {"ssd_scan", "attention", "attention over pages", "causal_conv1d", "grouped_mlp"}
    assert named | {"grouped_matmul_packed", "nvfp4"} < kernels
    assert all(row["holds"] for row in report["checks"]) and report["train"]["steps"] == 10
    assert report["times"] == [] and "nothing was timed" in done.stdout


def test_a_wrong_kernel_fails(monkeypatch) -> None:
    def op(x, *, implementation: str):
        return x * (1.02 if implementation == kernels.KERNEL else 1.0)

    wrong = [("wrong", op, {"x": np.ones((2, 3), np.float32)}, ("output",))]
    monkeypatch.setattr(kernels, "checks", lambda interpreted: iter(wrong))
    monkeypatch.setattr(kernels, "_others", lambda interpreted: iter(()))
    (row,) = kernels.checked(interpreted=False)
    assert not row["holds"] and row["error"] == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("arguments", [(), ("--interpret",)])
def test_without_a_folder_it_says_how_it_is_called(arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage:") and not done.stdout


def test_kernels_are_timed_beside_their_xla_form_and_floor(monkeypatch) -> None:
    """What a TPU alone does otherwise, with a small product, interpreted."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    operands = shape(48, 128), shape(2, 128, 128), jax.ShapeDtypeStruct((2,), jnp.int32)
    proof = proofs._product("small", "forward", *operands, np.array([20, 28]))

    def broken(*operands: jax.Array) -> jax.Array:
        raise ValueError("it does not\nfit")

    found = iter((proof, dataclasses.replace(proof, run=broken), proof))
    clock = iter((0.0, 1.0, 2.0, tpu.TIMING + 1.0))
    monkeypatch.setattr(prove, "all_proofs", lambda: found)
    monkeypatch.setattr(tpu, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with pltpu.force_tpu_interpret_mode():
        times = list(tpu._times(DEVICES["v5p"]))
    monkeypatch.undo()
    whole, failed, late = times
    assert whole["ms"] > 0 and whole["xla_ms"] > 0 and whole["why"] == ""
    # Of this size its operands take longer to read than to multiply.
    assert whole["floor_ms"] == pytest.approx(1e3 * proof.bytes / 2.765e12)
    assert failed["ms"] is None and failed["xla_ms"] > 0 and failed["why"] == "ms: it does not fit"
    assert late["why"] == "not reached in time"
    trained = {"steps": 10, "holds": True, "seconds": 1.0, "why": ""}
    shown = tpu.lines({"device": "a", "mode": "b", "checks": [], "times": times, "train": trained})
    assert len(shown) == 6 and shown[3].split()[-4:] == ["it", "does", "not", "fit"]


def test_what_decides_how_much_a_kernel_does_is_given_with_its_proof() -> None:
    """Rows in pages have the context that their floor counts."""
    paged = [proof for proof in prove.all_proofs() if "paged" in proof.kernel]
    assert len(paged) == 4
    for proof in paged:
        q, pool, *likes = proof.operands
        table, before = (kernels._filled(proof, place) for place in (2, 3))
        assert [one.shape for one in (table, before)] == [like.shape for like in likes]
        assert len(np.unique(table)) == table.size == pool.shape[0] - 1
        rows, tokens = q.shape[:2]
        seen = sum((before + 1 + one).sum() for one in range(tokens))
        assert proof.flops == 4 * int(seen) * q.shape[2] * q.shape[3]
        assert (before + tokens == table.shape[1] * pool.shape[1]).all()
