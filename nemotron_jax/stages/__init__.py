"""What train.py runs: a module for each stage, with `run(config, directory, mesh)`."""

import importlib
from typing import TYPE_CHECKING

from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory

if TYPE_CHECKING:
    from jax.sharding import Mesh  # jax reads the environment when it is imported

# By `RunConfig.stage`; a stage's module is imported when a run asks for it.
STAGES = {
    "pretrain": "nemotron_jax.stages.pretrain",
    "sft": "nemotron_jax.stages.sft",
    "grpo": "nemotron_jax.stages.grpo",
    "distill": "nemotron_jax.stages.distill",
}


def run(config: RunConfig, directory: RunDirectory, mesh: "Mesh") -> int:
    """Train a run in its directory up to its last step, or go on with it; the exit status.

    Prints what came out. Whatever is done already is not done again.
    """
    return importlib.import_module(STAGES[config.stage]).run(config, directory, mesh)
