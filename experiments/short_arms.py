"""What arms of short runs share, in processes that have not used jax yet."""

import jax

from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.corpus import prepare
from nemotron_jax.data.loader import held_out_batches
from nemotron_jax.pretrained import data_of
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.types import Batch


def mesh_of(config: RunConfig) -> jax.sharding.Mesh:
    """The run's mesh of this process's devices."""
    return make_mesh(config.mesh, jax.devices())


def held_out(config: RunConfig, run: RunDirectory, rows: int) -> list[Batch]:
    """Held-out rows of a run's text."""
    model, data = config.model, data_of(config.data, config.init_from, run)
    options = {"eos_token": model.eos_token, "progress": lambda line: None}
    _, corpus = prepare(data, model.vocab_size, run.path, **options)
    return held_out_batches(corpus, data, 0, rows)
