"""AdamW over a table of named parameters: decay on matrices only, selection biases left alone."""

import dataclasses
from collections.abc import Mapping

import jax
import optax

from nemotron_jax.config.run import OptimizerConfig, TrainingConfig
from nemotron_jax.layers.low_rank import Adapter
from nemotron_jax.layers.router import RouterWeight, SelectionBias
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import variables


@dataclasses.dataclass(frozen=True)
class Trained:
    """Which of a model's parameters a run moves, by dotted name; what they are their types say."""

    parameters: frozenset[str]  # by their gradients
    biases: frozenset[str]  # selection biases, by the load of their experts
    decayed: frozenset[str]  # with at least two axes of their own; stacking layers adds none

    @classmethod
    def of(cls, model: Nemotron, config: TrainingConfig) -> "Trained":
        """Those that `trains` names, and the MTP block only where it has a loss: a parameter
        without a gradient does not decay either."""
        found = variables(model)
        drafts = {id(variable) for variable in variables(model.mtp_block).values()}
        if config.trains == "lora":
            moved = {name for name, one in found.items() if isinstance(one, Adapter)}
        elif config.trains == "mtp":
            moved = {name for name, one in found.items() if id(one) in drafts}
        else:
            left = drafts if config.mtp_depths == 0 else set()
            moved = {name for name, one in found.items() if id(one) not in left}
        biases = {name for name in moved if isinstance(found[name], SelectionBias)}
        frozen = {
            name
            for name in moved
            if config.freeze_routers and isinstance(found[name], RouterWeight)
        }
        matrices = {name for name, variable in found.items() if len(variable.axes) >= 2}
        return cls(frozenset(moved - biases - frozen), frozenset(biases), frozenset(matrices))

    def select(self, table: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Those of a table that a gradient moves, in its order."""
        return {name: leaf for name, leaf in table.items() if name in self.parameters}


def make_optimizer(config: OptimizerConfig, trained: Trained) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay; the learning rate is applied by the step."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: {name: name in trained.decayed for name in tree}
        ),
    )
