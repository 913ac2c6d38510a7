"""Everything that a training run carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.nemotron import Nemotron
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
