"""Everything that a training run carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import make_mesh, replicated
from nemotron_jax.training.optimizer import make_optimizer, trained_parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Model, optimizer state, and counters of steps taken and steps skipped as non-finite."""

    model: Nemotron
    optimizer: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def init_state(config: RunConfig) -> TrainState:
    """A new run's state; every random draw comes from the config's seed."""
    model = Nemotron(config.model, rngs=nnx.Rngs(config.seed))
    optimizer = make_optimizer(config.training.optimizer, model)
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(model, optimizer.init(trained_parameters(model)), zero(), zero(), zero())


def place_state(config: RunConfig) -> TrainState:
    """A new run's state, born on the devices of the run's mesh."""
    sharding = replicated(make_mesh(config.mesh))
    return jax.jit(lambda: init_state(config), out_shardings=sharding)()


def abstract_state(config: RunConfig) -> TrainState:
    """Shapes and shardings of a run's state; costs no memory."""
    sharding = replicated(make_mesh(config.mesh))
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, jax.eval_shape(lambda: init_state(config)))
