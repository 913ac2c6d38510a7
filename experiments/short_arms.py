"""What arms of short runs share, in processes that have not used jax yet."""

from collections.abc import Callable
from typing import Any

import jax

from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.corpus import prepare
from nemotron_jax.data.loader import held_out_batches
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.posttraining.result_file import read_values, write_values
from nemotron_jax.pretrained import data_of, load_pretrained
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.types import Batch


def mesh_of(config: RunConfig) -> jax.sharding.Mesh:
    """The run's mesh of this process's devices."""
    return make_mesh(config.mesh, jax.devices())


def both_ends(
    config: RunConfig,
    run: RunDirectory,
    rows: int,
    result: Callable[[Nemotron, Nemotron, list[Batch]], dict[str, Any]],
) -> dict[str, Any]:
    """What `result` says of the model that a run began with, the one that it made, and so many
    held-out rows of its text; read from the run's result.json where that was written before."""
    if found := read_values(run.result):
        return found
    mesh = mesh_of(config)
    with jax.set_mesh(mesh):
        first, last = (
            load_pretrained(path, mesh=mesh, layout="training")
            for path in (config.init_from, run.path)
        )
        found = result(first, last, _held_out(config, run, rows))
    write_values(run, found)
    return found


def _held_out(config: RunConfig, run: RunDirectory, rows: int) -> list[Batch]:
    """Held-out rows of a run's text."""
    model, data = config.model, data_of(config.data, config.init_from, run)
    silent = lambda line: None
    _, corpus = prepare(
        data, model.vocab_size, run.path, eos_token=model.eos_token, progress=silent
    )
    return held_out_batches(corpus, data, 0, rows)
