"""The arms of experiments/qad.py, in processes that have not used jax yet."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from experiments import short
from experiments.harness import Measured
from experiments.short_arms import both_ends, mesh_of
from nemotron_jax.config.distill import DistillConfig
from nemotron_jax.config.precision import ROLES, PrecisionConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.stages import distill, pretrain
from nemotron_jax.training.metrics import read_records
from nemotron_jax.types import Batch

RATE = 3e-4
RESULT_ROWS = 128
# Every matmul, as where a deployed model is to be as small as it can be: with Super's recipe this
# model loses too little to be won back.
PRECISION = PrecisionConfig(nvfp4_roles=ROLES)

Lengths = tuple[int, int]  # steps of pre-training, and those after it


def config_of(lengths: Lengths, seed: int, before: Path) -> RunConfig:
    """The distillation."""
    config = short.gone_on(short.start(seed, lengths[0]), before, lengths[1], RATE)
    # What no teacher speaks of stays out of the loss.
    still = {"mtp_depths": 0, "aux_loss_scale": 0.0, "router_bias_rate": 0.0}
    return dataclasses.replace(
        config,
        stage="distill",
        distill=DistillConfig(str(before), result_rows=RESULT_ROWS),
        training=dataclasses.replace(config.training, **still),
        execution=dataclasses.replace(config.execution, precision=PRECISION),
    )


def rounded(lengths: Lengths, seed: int, directory: Path, before: None) -> Measured | None:
    """The teacher, pre-trained; and what rounding alone makes of it."""
    config, run = short.start(seed, lengths[0]), RunDirectory(directory)
    pretrain.run(config, run, mesh_of(config))
    return _measured(config_of(lengths, seed, directory), run, lengths[0])


def distilled(lengths: Lengths, seed: int, directory: Path, before: Path) -> Measured | None:
    """Training on the teacher's predictions."""
    config, run = config_of(lengths, seed, before), RunDirectory(directory)
    distill.run(config, run, mesh_of(config))
    return _measured(config, run, lengths[1])


def ordinary(lengths: Lengths, seed: int, directory: Path, before: Path) -> Measured | None:
    """Training on the text, in the same precision."""
    config, run = config_of(lengths, seed, before), RunDirectory(directory)
    plain = dataclasses.replace(config, stage="pretrain", distill=DistillConfig())
    pretrain.run(plain, run, mesh_of(config))
    return _measured(config, run, lengths[1])


def _measured(config: RunConfig, run: RunDirectory, steps: int) -> Measured | None:
    """A finished run beside its teacher; None before its end."""
    if run.whole_step() < steps:
        return None
    found = both_ends(config, run, config.distill.result_rows, functools.partial(_result, config))
    records = read_records(run.metrics)[0]
    kl, is_teacher = found["teacher_kl"], str(run.path) == config.init_from
    curve = [[r["step"], r["teacher_kl"]] for r in records if "teacher_kl" in r]
    ends = [[0, kl["student_before"]], [0 if is_teacher else steps, kl["student_after"]]]
    tokens = 0 if is_teacher else records[-1]["tokens"]
    return Measured(steps, curve or ends, kl["student_after"], tokens, {"result": found})


def _result(
    config: RunConfig, first: Nemotron, last: Nemotron, batches: list[Batch]
) -> dict[str, Any]:
    """Of students, beside a teacher that is loaded for it."""
    return distill.Lesson(config, mesh_of(config)).result(first, last, batches)
