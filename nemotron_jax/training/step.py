"""One optimizer step: losses and gradients over micro-batches, AdamW, and the routers' bias
update."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nemotron_jax.config.run import RunConfig, TrainingConfig
from nemotron_jax.host import give_back_freed_memory
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, model_axes, unflatten
from nemotron_jax.sharding import shard, shard_parameter
from nemotron_jax.training.losses import Objective, Sums, pretrain_objective
from nemotron_jax.training.optimizer import is_trained, make_optimizer, trained_parameters
from nemotron_jax.training.schedule import learning_rate
from nemotron_jax.training.state import TrainState
from nemotron_jax.types import Batch
from pallas_kernels import nvfp4

Metrics = dict[str, Array]


def make_train_step(
    config: RunConfig, objective: Objective | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step of a run; it donates the state's memory. `objective`: the pre-training
    loss by default."""
    chosen = pretrain_objective(config) if objective is None else objective
    step = lambda state, batch: train_step(state, batch, config, chosen)
    return jax.jit(step, donate_argnums=0)


def compile_train_step(
    config: RunConfig, state: TrainState, batch: Batch, objective: Objective | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The run's step, compiled for states and batches like these; it never compiles again.

    Given anything of another shape or placement it raises.
    """
    step = make_train_step(config, objective).lower(state, batch).compile()
    give_back_freed_memory()  # the compiler's, before the step's own comes on top
    return step


def train_step(
    state: TrainState, batch: Batch, config: RunConfig, objective: Objective | None = None
) -> tuple[TrainState, Metrics]:
    """The next state and the step's metrics; a step with a non-finite loss or gradient changes no
    parameter."""
    training = config.training
    objective = pretrain_objective(config) if objective is None else objective
    gradients, sums = _gradients(state, batch, config, objective)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])

    rate = learning_rate(training.schedule, state.step, batch_tokens(config))
    optimizer = make_optimizer(training.optimizer, state.model)
    parameters = trained_parameters(state.model, training)
    updates, moments = optimizer.update(gradients, state.optimizer, parameters)
    parameters = {name: p - rate * updates[name] for name, p in parameters.items()}
    parameters = flatten(state.model) | parameters | _balanced_biases(state.model, sums, training)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    skipped = jnp.where(finite, 0, 1)
    new_state = TrainState(
        model=keep(unflatten(state.model, parameters), state.model),
        optimizer=keep(moments, state.optimizer),
        step=state.step + 1,
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
    )
    return new_state, {
        **{name: value for name, value in sums.items() if value.ndim == 0},
        "grad_norm": norm,
        "learning_rate": rate,
        "expert_load_max": _worst_load(sums.get("router_load", jnp.zeros((0, 0)))),
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }


def batch_tokens(config: RunConfig) -> int:
    """Tokens of one optimizer step, padding included."""
    return config.data.batch_size * config.data.sequence_length


def _gradients(
    state: TrainState, batch: Batch, config: RunConfig, objective: Objective
) -> tuple[dict[str, Array], Sums]:
    """float32 gradients of the trained parameters and the reported sums, over all micro-batches.

    No value depends on how the batch is cut: parts are divided by the whole batch's totals, and
    tokens keep their numbers in it, by which they draw random bits.
    """
    count, table = config.training.micro_batches, flatten(state.model)
    trained = trained_parameters(state.model, config.training)
    totals = objective.totals(batch)
    numbers = jnp.arange(batch.tokens.size, dtype=jnp.int32).reshape(batch.tokens.shape)
    batch = dataclasses.replace(batch, numbers=numbers)
    # A function of seed and step alone: a resumed run rounds as the one that was never stopped.
    key = nvfp4.fold(jnp.stack([jnp.uint32(config.seed), state.step.astype(jnp.uint32)]), 0)

    def loss(parameters: dict[str, Array], part: Batch) -> tuple[Array, Sums]:
        model = unflatten(state.model, table | parameters)
        return objective.loss(model, part, totals, key)

    gradient = jax.grad(loss, has_aux=True)
    if count == 1:
        return _laid_out(state.model, *gradient(trained, batch))
    # Every count-th row is a micro-batch's, so that each lies on all devices as the batch does.
    split = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0), batch
    )
    shapes = jax.eval_shape(gradient, trained, jax.tree.map(lambda a: a[0], split))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: tuple, part: Batch) -> tuple[tuple, None]:
        part = jax.tree.map(lambda a: shard(a, "batch", *(None,) * (a.ndim - 1)), part)
        found = _laid_out(state.model, *gradient(trained, part))
        return jax.tree.map(jnp.add, total, found), None

    return jax.lax.scan(add, _laid_out(state.model, *start), split)[0]


def _laid_out(model: Nemotron, gradients: dict[str, Array], sums: Sums) -> tuple:
    """Gradients laid out as their parameters are."""
    axes = model_axes(model)
    return {name: shard_parameter(g, axes[name]) for name, g in gradients.items()}, sums


def _balanced_biases(model: Nemotron, sums: Sums, config: TrainingConfig) -> dict[str, Array]:
    """Selection biases moved towards an even load, by the sign of each expert's deficit; those
    alone whose routers the run trains."""
    trained = trained_parameters(model)
    biases = {name: bias for name, bias in flatten(model).items() if name not in trained}
    moved, mtp_row = {}, 0
    for name, bias in biases.items():
        if not is_trained(name, config):
            continue
        load = sums.get("router_load")
        if name.startswith("mtp_block."):
            load = sums.get("mtp_router_load")
            load = load[mtp_row] if load is not None and load.size else None
            mtp_row += 1
        moved[name] = bias if load is None else balance(bias, load, config.router_bias_rate)
    return moved


def balance(
    bias: Float[Array, "... E"], load: Float[Array, "... E"], rate: float
) -> Float[Array, "... E"]:
    """`bias + rate * sign(mean load - load)`, the auxiliary-loss-free balancing of DeepSeek-V3."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def _worst_load(load: Float[Array, "layers E"]) -> Float[Array, ""]:
    """The fullest expert's tokens over the mean of its layer; the worst layer's."""
    if load.size == 0:
        return jnp.ones(())
    return jnp.max(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9))
