"""The arms of experiments/mtp_boost.py, in processes that have not used jax yet."""

import dataclasses
import functools
from pathlib import Path

from experiments import short
from experiments.harness import Measured
from experiments.short_arms import both_ends, mesh_of
from nemotron_jax.config.distill import DraftObjective
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.stages import boosting, pretrain
from nemotron_jax.training.metrics import read_records

RATE = 1e-3
DEPTHS = 3  # that learn; one block serves those further on, too
AT = "1"  # the temperature that is compared

Lengths = tuple[int, int]  # steps of pre-training, and those after it


def config_of(lengths: Lengths, seed: int, before: Path, mtp: str = "kl") -> RunConfig:
    """The training of the drafts alone."""
    config = short.gone_on(short.start(seed, lengths[0]), before, lengths[1], RATE)
    training = dataclasses.replace(
        config.training, trains="mtp", mtp_depths=DEPTHS, mtp_loss_scale=1.0
    )
    return dataclasses.replace(
        config, training=training, objective=DraftObjective(mtp=mtp, text="own")
    )


def before(lengths: Lengths, seed: int, directory: Path, before: None) -> Measured | None:
    """The model as it is pre-trained."""
    config, run = short.start(seed, lengths[0]), RunDirectory(directory)
    pretrain.run(config, run, mesh_of(config))
    return _measured(config_of(lengths, seed, directory), run, lengths[0])


def kl(lengths: Lengths, seed: int, directory: Path, before: Path) -> Measured | None:
    """Drafts that learn what the model predicts."""
    config, run = config_of(lengths, seed, before), RunDirectory(directory)
    pretrain.run(config, run, mesh_of(config))
    return _measured(config, run, lengths[1])


def cross_entropy(lengths: Lengths, seed: int, directory: Path, before: Path) -> Measured | None:
    """Drafts that learn the tokens themselves."""
    config = config_of(lengths, seed, before, "cross_entropy")
    run = RunDirectory(directory)
    pretrain.run(config, run, mesh_of(config))
    return _measured(config, run, lengths[1])


def _measured(config: RunConfig, run: RunDirectory, steps: int) -> Measured | None:
    """A finished run beside the model that it began with; None before its end."""
    if run.whole_step() < steps:
        return None
    result = functools.partial(boosting.result, config)
    found = both_ends(config, run, config.objective.result_prompts, result)
    records = read_records(run.metrics)[0]
    values, is_first = found["temperatures"][AT], str(run.path) == config.init_from
    curve = [[0, values["before"]], [0 if is_first else steps, values["after"]]]
    more = {"result": found, "mtp_loss": [[r["step"], r["mtp_loss"]] for r in records]}
    tokens = 0 if is_first else records[-1]["tokens"]
    return Measured(steps, curve, values["after"], tokens, more)
