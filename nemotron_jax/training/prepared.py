"""What is derived of a run once and handed down, and the state that it begins with."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.adapters import abstract_adapted, add_adapters, as_base
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import current_mesh
from nemotron_jax.training.distillation import Backbone
from nemotron_jax.training.losses import Objective, pretrain_objective
from nemotron_jax.training.optimizer import Trained, make_optimizer
from nemotron_jax.training.state import TrainState, placed


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that can be trained: its config is checked, its directory is its own."""

    config: RunConfig
    directory: RunDirectory | None  # None for steps that are taken to be timed or planned
    trained: Trained
    optimizer: optax.GradientTransformation
    objective: Callable[[Execution], Objective]  # what a step computed so minimises

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, padding included."""
        return self.config.data.batch_size * self.config.data.sequence_length

    @functools.cached_property
    def shapes(self) -> TrainState:
        """Shapes and shardings of the state, on the mesh that was entered when first asked for."""
        return abstract_state(self)


def prepare_run(
    config: RunConfig,
    directory: RunDirectory | None = None,
    *,
    objective: Callable[[Execution], Objective] | None = None,
) -> Prepared:
    """A run ready to be trained in its directory; `objective` is pre-training's by default.

    Raises ValueError when the directory cannot be this run's.
    """
    if directory is not None:
        directory.check(config)
    trained = Trained.of(abstract_adapted(config.model, config.lora), config.training)
    optimizer = make_optimizer(config.training.optimizer, trained)
    if objective is None:
        objective = functools.partial(pretrain_objective, config.training)
        if config.objective.mtp == "kl":
            objective = functools.partial(objective, against=Backbone(config.objective))
    return Prepared(config, directory, trained, optimizer, objective)


def init_state(run: Prepared) -> TrainState:
    """A new run's state; every random draw comes from the config's seed."""
    config = run.config
    return first_state(run, random_model(config.model, config.lora, config.seed))


def random_model(config: ModelConfig, lora: LoRAConfig | None, seed: int) -> Nemotron:
    """The model that a run begins with which is given none: the base of its adapters, where it
    trains some, without these."""
    dtype = "float32" if lora is None else lora.base_dtype
    model = Nemotron(config, rngs=nnx.Rngs(seed), dtype=dtype)
    return model if lora is None else as_base(model, lora)


def first_state(run: Prepared, model: Nemotron) -> TrainState:
    """The state of a run that begins from a model's parameters, with new adapters where the run
    trains some."""
    if run.config.lora is not None:
        model = add_adapters(model, run.config.lora, jax.random.key(run.config.seed))
    zero = lambda: jnp.zeros((), jnp.int32)
    moments = run.optimizer.init(run.trained.select(flatten(model)))
    return TrainState(model, moments, zero(), zero(), zero())


def place_state(run: Prepared, model: Nemotron | None = None) -> TrainState:
    """A run's first state, born on the mesh as the table says; no device holds more than its part.

    Of random parameters, or those of a model.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.shapes)
    if model is None:
        return jax.jit(lambda: init_state(run), out_shardings=shardings)()
    return jax.jit(lambda model: first_state(run, model), out_shardings=shardings)(model)


def abstract_state(run: Prepared, mesh: Mesh | None = None) -> TrainState:
    """Shapes and shardings of a run's state on the mesh, the one entered by default; costs no
    memory."""
    mesh = current_mesh() if mesh is None else mesh
    state = jax.eval_shape(lambda: init_state(run))
    return state if mesh is None else placed(state, mesh)
