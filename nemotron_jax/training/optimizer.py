"""AdamW over a table of named parameters: decay on matrices only, selection biases left alone."""

import jax
import optax
from flax import nnx

from nemotron_jax.config.run import OptimizerConfig, TrainingConfig
from nemotron_jax.layers.router import SelectionBias
from nemotron_jax.model.adapters import is_adapter
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten


def trained_parameters(
    model: Nemotron, config: TrainingConfig | None = None
) -> dict[str, jax.Array]:
    """The parameters that a gradient moves: never the routers' selection biases.

    With a config those alone that its `trains` names, and the MTP block only where it has a loss:
    a parameter without a gradient does not decay either.
    """
    frozen = _names(model, lambda variable: isinstance(variable, SelectionBias))
    if config is not None and config.freeze_routers:
        frozen |= {name for name in flatten(model) if ".router." in name}
    wanted = lambda name: name not in frozen and (config is None or is_trained(name, config))
    return {name: leaf for name, leaf in flatten(model).items() if wanted(name)}


def is_trained(name: str, config: TrainingConfig) -> bool:
    """Whether a run moves the parameter, or the selection bias, of this dotted name."""
    if config.trains == "lora":
        return is_adapter(name)
    is_mtp = name.startswith("mtp_block.")
    if config.trains == "mtp":
        return is_mtp
    return config.mtp_depths > 0 or not is_mtp


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
