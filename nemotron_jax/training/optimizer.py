"""AdamW over a table of named parameters: decay on matrices only, selection biases left alone."""

import jax
import optax
from flax import nnx

from nemotron_jax.config.run import OptimizerConfig
from nemotron_jax.layers.router import SelectionBias
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten


def trained_parameters(model: Nemotron) -> dict[str, jax.Array]:
    """The parameters that a gradient moves: all but the routers' selection biases."""
    frozen = _names(model, lambda variable: isinstance(variable, SelectionBias))
    return {name: leaf for name, leaf in flatten(model).items() if name not in frozen}


def make_optimizer(config: OptimizerConfig, model: Nemotron) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay; the learning rate is applied by the step.

    Decay reaches parameters with at least two axes of their own; stacking layers adds none.
    """
    matrices = _names(model, lambda variable: len(variable.axes) >= 2)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: {name: name in matrices for name in tree}
        ),
    )


def _names(model: Nemotron, wanted) -> set[str]:
    is_variable = lambda node: isinstance(node, nnx.Variable)
    flags = jax.tree.map(
        lambda variable: jax.tree.map(lambda _: wanted(variable), variable),
        model,
        is_leaf=is_variable,
    )
    return {name for name, flag in flatten(flags).items() if flag}
