"""What the header of a full-size run says of its seconds is what the estimate says."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.planning.estimate import Question, estimate
from pallas_kernels.devices import slice_of

CONFIGS = Path(__file__).parents[2] / "configs"


def full_size() -> dict[str, RunConfig]:
    found = {}
    for file in sorted(CONFIGS.glob("*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        if hasattr(module, "get_config") and not inspect.signature(module.get_config).parameters:
            config = from_config_dict(RunConfig, module.get_config())
            if accounting.parameters(config.model).total > 1e9:
                found[file.stem] = config
    return found


RUNS = full_size()


def test_there_are_full_size_runs() -> None:
    assert len(RUNS) >= 7


@pytest.mark.parametrize("name", RUNS)
def test_a_header_says_the_estimated_seconds(name: str) -> None:
    config, head = RUNS[name], (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    target = re.search(r"\b(?:v5e|v5p|v6e|tpu7x|[ahb]\d00):[\dx]+", head)[0]
    stage = "grpo" if config.stage == "grpo" else "train"
    mesh = dataclasses.asdict(config.mesh)
    report = estimate(Question(config, stage=stage, mesh=mesh), slice_of(target))
    assert report["fits"], report["why"]
    said = re.search(r"([\d.]+)\s+s\s+a\s+step\s+as\s+estimated", head)
    assert said, f"{name}: the header must say its estimated seconds"
    total = report["estimated_step_seconds"]["total"]
    assert float(said[1]) == pytest.approx(total, rel=0.05), f"{name}: {total:.3g} s a step"
    if stage == "grpo":
        played = re.search(r"([\d.]+) of them for the episodes", head)
        assert float(played[1]) == pytest.approx(report["grpo"]["rollout"]["seconds"], rel=0.05)
