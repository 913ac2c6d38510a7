"""One optimizer step: losses and gradients over micro-batches, AdamW, and the routers' bias
update."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nemotron_jax.model.kept_codes import with_codes
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, model_axes, unflatten
from nemotron_jax.sharding import shard, shard_parameter
from nemotron_jax.training.losses import Objective, Sums
from nemotron_jax.training.prepared import Prepared
from nemotron_jax.training.schedule import learning_rate
from nemotron_jax.training.state import TrainState
from nemotron_jax.types import Batch
from pallas_kernels import nvfp4

Metrics = dict[str, Array]


def make_train_step(
    run: Prepared, objective: Objective | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled step of a run; it donates the state's memory. `objective`: the run's own, as
    its config computes it, by default. After the batch it takes what the objective is given."""
    chosen = run.objective(run.config.execution) if objective is None else objective

    def step(state: TrainState, batch: Batch, *given: Any) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, run, dataclasses.replace(chosen, given=given))

    return jax.jit(step, donate_argnums=0)


def compile_train_step(
    run: Prepared, state: TrainState, batch: Batch, objective: Objective | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The run's step, compiled for states and batches like these; it never compiles again.

    Given anything of another shape or placement it raises.
    """
    given = () if objective is None else objective.given
    return make_train_step(run, objective).lower(state, batch, *given).compile()


def train_step(
    state: TrainState, batch: Batch, run: Prepared, objective: Objective
) -> tuple[TrainState, Metrics]:
    """The next state and the step's metrics; a step with a non-finite loss or gradient changes no
    parameter."""
    training, table = run.config.training, flatten(state.model)
    gradients, sums = _gradients(state, batch, run, objective)
    loads = sums.pop("router_load", {}), sums.pop("mtp_router_load", {})
    norm = optax.tree.norm(gradients)
    # The norm is finite only where every gradient is: one number stands for all of them.
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])

    rate = learning_rate(training.schedule, state.step, run.tokens_per_step)
    parameters = run.trained.select(table)
    updates, moments = run.optimizer.update(gradients, state.optimizer, parameters)
    parameters = {name: p - rate * updates[name] for name, p in parameters.items()}
    biases = {
        name: balance(table[name], load, training.router_bias_rate)
        for name, load in {**loads[0], **loads[1]}.items()
        if name in run.trained.biases
    }
    parameters = table | parameters | biases
    # A step that is not finite leaves moments and biases as they were, too.
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
        **sums,
        "grad_norm": norm,
        "learning_rate": rate,
        **_expert_loads(loads[0].values()),
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }


def _gradients(
    state: TrainState, batch: Batch, run: Prepared, objective: Objective
) -> tuple[dict[str, Array], Sums]:
    """float32 gradients of the trained parameters and the reported sums, over all micro-batches.

    No value depends on how the batch is cut: parts are divided by the whole batch's totals, and
    tokens keep their numbers in it, by which they draw random bits. Weights in a lower format are
    quantised once, before the first part.
    """
    model = state.model
    if objective.precision.emulated:
        model = with_codes(model, objective.precision)
    count, table = run.config.training.micro_batches, flatten(model)
    trained = run.trained.select(table)
    totals = objective.totals(batch)
    numbers = jnp.arange(batch.tokens.size, dtype=jnp.int32).reshape(batch.tokens.shape)
    batch = dataclasses.replace(batch, numbers=numbers)
    # A function of seed and step alone: a resumed run rounds as the one that was never stopped.
    key = nvfp4.fold(jnp.stack([jnp.uint32(run.config.seed), state.step.astype(jnp.uint32)]), 0)

    def loss(parameters: dict[str, Array], part: Batch) -> tuple[Array, Sums]:
        changed = unflatten(model, table | parameters)
        return objective.loss(changed, part, totals, key, *objective.given)

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


def balance(
    bias: Float[Array, "... E"], load: Float[Array, "... E"], rate: float
) -> Float[Array, "... E"]:
    """`bias + rate * sign(mean load - load)`, the auxiliary-loss-free balancing of DeepSeek-V3."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def _expert_loads(loads: Iterable[Float[Array, "layers E"]]) -> Metrics:
    """Tokens of an expert over the mean of its layer: of all experts of all layers the most, the
    least, and what 5 and 95 in a hundred of them stay below. 1 where none routes."""
    shares = [load / jnp.maximum(jnp.mean(load, axis=-1, keepdims=True), 1e-9) for load in loads]
    every = jnp.concatenate([jnp.ravel(one) for one in shares] or [jnp.ones(1)])
    low, high = jnp.quantile(every, jnp.array([0.05, 0.95]), method="nearest")
    return {
        "expert_load_max": jnp.max(every),
        "expert_load_95": high,
        "expert_load_5": low,
        "expert_load_min": jnp.min(every),
    }
