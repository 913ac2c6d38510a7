"""Everything that a training run carries from step to step."""

import dataclasses

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import abstract_on, model_shardings
from nemotron_jax.sharding import replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Model, optimizer state, and counters of steps taken and steps skipped as non-finite."""

    model: Nemotron
    optimizer: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def placed(state: TrainState, mesh: Mesh) -> TrainState:
    """The shapes of a state with where each lies on a mesh; moments lie as their parameters do."""
    shardings = model_shardings(state.model, mesh)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment is kept under its parameter's dotted name.
        names = [str(getattr(key, "key", "")) for key in path]
        name = next((name for name in names if name in shardings), None)
        sharding = replicated(mesh) if name is None else shardings[name]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    model = abstract_on(state.model, mesh)
    rest = dataclasses.replace(state, model=None)
    return dataclasses.replace(jax.tree_util.tree_map_with_path(place, rest), model=model)
