"""Everything that a training run carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.adapters import add_adapters
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, model_shardings, unflatten
from nemotron_jax.sharding import current_mesh, replicated
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
    return first_state(config, Nemotron(config.model, rngs=nnx.Rngs(config.seed)))


def first_state(config: RunConfig, model: Nemotron) -> TrainState:
    """The state of a run that begins from a model's parameters, with new adapters where the run
    trains some."""
    if config.lora is not None:
        model = add_adapters(model, config.lora, jax.random.key(config.seed))
    optimizer = make_optimizer(config.training.optimizer, model)
    zero = lambda: jnp.zeros((), jnp.int32)
    moments = optimizer.init(trained_parameters(model, config.training))
    return TrainState(model, moments, zero(), zero(), zero())


def place_state(config: RunConfig) -> TrainState:
    """A new run's state, born on the mesh as the table says; no device holds more than its part."""
    placed = abstract_state(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    return jax.jit(lambda: init_state(config), out_shardings=shardings)()


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Shapes and shardings of a run's state on the mesh, the one entered by default; costs no
    memory."""
    mesh = current_mesh() if mesh is None else mesh
    state = jax.eval_shape(lambda: init_state(config))
    if mesh is None:
        return state
    shardings = model_shardings(state.model, mesh)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment is kept under its parameter's dotted name.
        names = [str(getattr(key, "key", "")) for key in path]
        name = next((name for name in names if name in shardings), None)
        sharding = replicated(mesh) if name is None else shardings[name]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    model = unflatten(
        state.model,
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in flatten(state.model).items()
        },
    )
    rest = dataclasses.replace(state, model=None)
    return dataclasses.replace(jax.tree_util.tree_map_with_path(place, rest), model=model)
