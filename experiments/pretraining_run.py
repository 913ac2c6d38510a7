"""One run of pre-training to its end, in a process that has not used jax yet."""

from pathlib import Path
from typing import Any

import jax

from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.stages import pretrain
from nemotron_jax.training.metrics import read_records


def finished(config: RunConfig, directory: Path) -> list[dict[str, Any]] | None:
    """The records of the run once it has come to its end; None where a signal stopped it."""
    run = RunDirectory(directory)
    pretrain.run(config, run, make_mesh(config.mesh, jax.devices()))
    records = read_records(run.metrics)[0]
    return records if records and records[-1]["step"] == config.training.steps else None
