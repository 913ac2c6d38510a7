"""Runs of pre-training as arms of an experiment: all read the same text in the same order."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs import pretrain_tiny
from experiments.harness import Measured
from nemotron_jax import host
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import MeshConfig, RunConfig

METRIC = "held_out_loss"
_EVALUATIONS = 6  # of a run


def base(seed: int, steps: int) -> RunConfig:
    """The tiny run of pre-training on one device, its schedule stretched over so many steps."""
    config = from_config_dict(RunConfig, pretrain_tiny.get_config())
    training, step = config.training, config.data.batch_size * config.data.sequence_length
    scaled = lambda tokens: tokens * steps // training.steps // step * step
    schedule = dataclasses.replace(
        training.schedule,
        warmup_tokens=scaled(training.schedule.warmup_tokens),
        decay_tokens=scaled(training.schedule.decay_tokens),
        total_tokens=steps * step,
    )
    return dataclasses.replace(
        config,
        seed=seed,
        mesh=MeshConfig(),
        training=dataclasses.replace(training, steps=steps, schedule=schedule),
        logging=dataclasses.replace(
            config.logging,
            evaluate_every=max(1, steps // _EVALUATIONS),
            checkpoint_every=max(1, steps // _EVALUATIONS),
            keep_checkpoints=1,
            sample_tokens=0,
        ),
    )


def arm(
    config_of: Callable[[int], RunConfig],
    more: Callable[[RunConfig], Mapping[str, Any]] = lambda config: {},
) -> Callable[[int, Path, Path | None], Measured | None]:
    """What brings one run to its end; `more` is said of it beside its curve."""
    return functools.partial(_run, config_of, more)


def _run(
    config_of: Callable[[int], RunConfig],
    more: Callable[[RunConfig], Mapping[str, Any]],
    seed: int,
    directory: Path,
    before: Path | None,
) -> Measured | None:
    config = config_of(seed)
    host.keep_compiled_programs()
    host.show_cpu_devices(config.mesh.size)
    # jax reads the environment when it is imported; the process that starts runs needs none.
    from experiments import pretraining_run

    records = pretraining_run.finished(config, directory)
    if records is None:
        return None
    curve = [[r["step"], r[METRIC]] for r in records if METRIC in r]
    last = records[-1]
    said = {"expert_load_max": [[r["step"], r["expert_load_max"]] for r in records]}
    return Measured(
        last["step"], curve, last[f"whole_{METRIC}"], last["tokens"], said | dict(more(config))
    )
