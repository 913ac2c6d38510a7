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

    Prints what it does, what came out and what to do next. Whatever is done
    already is not done again.
    """
    from nemotron_jax.stages import words

    if directory.writer:
        print(words.opening(config, directory), flush=True)
    status = importlib.import_module(STAGES[config.stage]).run(config, directory, mesh)
    if status == 0 and directory.writer and (line := words.closing(config, directory)):
        print(line)
    return status
