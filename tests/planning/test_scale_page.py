"""The table of docs/scale.md says what the estimate says."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.planning.estimate import Question, estimate
from pallas_kernels.devices import slice_of

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
ROWS = re.findall(
    r"^\| `(\w+:[\dx]+)` \| \d+ \| `(\w+)` \| (.+?) \| (\d+) × \d+ \| "
    r"(\d+) of \d+ \| ([\d.]+) s \|$",
    PAGE,
    re.M,
)
# The estimate's own bytes are within a fifth of what compiled steps hold: closer says no more.
CLOSE = 0.2
RUNS = sorted({run for _, run, *_ in ROWS})


def test_the_page_has_slices_of_each_kind() -> None:
    assert len(ROWS) > 25 and len(RUNS) == 3
    assert {target.split(":")[0] for target, *_ in ROWS} >= {"v5p", "v6e", "tpu7x", "h100", "b200"}


@pytest.mark.parametrize("run", RUNS)
def test_its_bytes_and_seconds_are_the_estimates(run: str) -> None:
    config = from_config_dict(RunConfig, importlib.import_module(f"configs.{run}").get_config())
    for target, name, mesh, micro_batches, gigabytes, seconds in ROWS:
        if name != run:
            continue
        axes = {axis: int(size) for axis, size in re.findall(r"(\w+) (\d+)", mesh)}
        training = dataclasses.replace(config.training, micro_batches=int(micro_batches))
        there = dataclasses.replace(config, training=training, mesh=MeshConfig(**axes))
        report = estimate(Question(there, mesh=axes), slice_of(target))
        total = report["estimated_step_seconds"]["total"]
        assert float(seconds) == pytest.approx(total, rel=CLOSE), f"{target}: {total:.3g} s a step"
        found = report["bytes_per_device"]["total"] / 1e9
        assert float(gigabytes) == pytest.approx(found, rel=CLOSE), f"{target}: {found:.0f} GB"


CELLS = r" (.+?) \| (\d+) of \d+ \| (.+?) \| (\S+) \|"  # mesh, bytes, step, MFU
SLICES = re.findall(
    rf"^\| `(\w+:[\dx]+)` \|{CELLS}{CELLS}$",
    (Path(__file__).parents[2] / "docs" / "sharding.md").read_text("utf-8"),
    re.M,
)


@pytest.mark.parametrize(("run", "first"), [("pretrain_super_phase1", 0), ("nano", 4)])
def test_the_table_of_slices_is_the_estimates(run: str, first: int) -> None:
    config = from_config_dict(RunConfig, importlib.import_module(f"configs.{run}").get_config())
    assert len(SLICES) > 15
    for target, *cells in SLICES:
        report = estimate(Question(config), slice_of(target))
        mesh, size, step, mfu = cells[first : first + 4]
        found = report["bytes_per_device"]["total"] / 1e9
        assert float(size) == pytest.approx(found, rel=CLOSE), f"{target}: {found:.0f} GB"
        assert (mesh != "–") == report["fits"] == (step != "does not fit") == (mfu != "–"), target
        if not report["fits"]:
            continue
        axes = {axis: int(count) for axis, count in re.findall(r"(\w+) (\d+)", mesh)}
        assert axes == {axis: n for axis, n in report["mesh"].items() if n > 1}, target
        total = report["estimated_step_seconds"]["total"]
        assert float(mfu) == pytest.approx(report["mfu"], rel=CLOSE), target
        assert float(step.removesuffix(" s")) == pytest.approx(total, rel=CLOSE), target
