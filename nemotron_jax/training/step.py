"""One optimizer step: losses and gradients over micro-batches, AdamW, and the routers' bias
update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nemotron_jax.config.run import RunConfig
from nemotron_jax.host import give_back_freed_memory
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.sharding import make_mesh, sum_over_rows
from nemotron_jax.training.losses import LossReport, pretrain_loss
from nemotron_jax.training.optimizer import make_optimizer, trained_parameters
from nemotron_jax.training.schedule import learning_rate
from nemotron_jax.training.state import TrainState
from nemotron_jax.types import Batch
from pallas_kernels import nvfp4

Metrics = dict[str, Array]


def make_train_step(config: RunConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step of a run; it takes the state's memory over."""
    return jax.jit(lambda state, batch: train_step(state, batch, config), donate_argnums=0)


def compile_train_step(
    config: RunConfig, state: TrainState, batch: Batch
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The run's step, compiled for states and batches like these; it never compiles again.

    Given anything of another shape or placement it raises.
    """
    step = make_train_step(config).lower(state, batch).compile()
    give_back_freed_memory()  # the compiler's, before the step's own comes on top
    return step


def train_step(state: TrainState, batch: Batch, config: RunConfig) -> tuple[TrainState, Metrics]:
    """The next state and the step's metrics; a step with a non-finite loss or gradient changes no
    parameter."""
    training = config.training
    gradients, report = _gradients(state, batch, config)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(report.loss)

    rate = learning_rate(training.schedule, state.step, batch_tokens(config))
    optimizer = make_optimizer(training.optimizer, state.model)
    parameters = trained_parameters(state.model)
    updates, moments = optimizer.update(gradients, state.optimizer, parameters)
    parameters = {name: p - rate * updates[name] for name, p in parameters.items()}
    parameters |= _balanced_biases(state.model, report, training.router_bias_rate)
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
        "loss": report.loss,
        "mtp_loss": report.mtp_loss,
        "aux_loss": report.aux_loss,
        "grad_norm": norm,
        "learning_rate": rate,
        "expert_load_max": _worst_load(report),
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }


def batch_tokens(config: RunConfig) -> int:
    """Tokens of one optimizer step, padding included."""
    return config.data.batch_size * config.data.sequence_length


def _gradients(
    state: TrainState, batch: Batch, config: RunConfig
) -> tuple[dict[str, Array], LossReport]:
    """float32 gradients of the trained parameters and the losses, summed over devices and
    micro-batches."""
    count = config.training.micro_batches
    share = 1 / (count * config.mesh.data)

    def part(rows: Batch, key: Array, model: Nemotron, valid_tokens: Array) -> tuple:
        gradient = jax.grad(pretrain_loss, has_aux=True)
        model_gradient, report = gradient(
            model,
            rows,
            config.training,
            config.execution,
            valid_tokens=valid_tokens,
            share=share,
            key=key,
        )
        return trained_parameters(model_gradient), report

    def local(rows: Batch, key: Array, model: Nemotron, valid_tokens: Array) -> tuple:
        if count == 1:
            return part(rows, key, model, valid_tokens)
        split = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), rows)
        keys = jnp.stack([nvfp4.fold(key, number) for number in range(count)])
        first = jax.tree.map(lambda a: a[0], (split, keys))
        shapes = jax.eval_shape(part, *first, model, valid_tokens)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, micro: (
            jax.tree.map(jnp.add, total, part(*micro, model, valid_tokens)),
            None,
        )
        return jax.lax.scan(add, start, (split, keys))[0]

    valid_tokens = jnp.sum(batch.weights, axis=(0, 1))
    # A function of seed and step alone: a resumed run rounds as the one that was never stopped.
    key = jnp.stack([jnp.uint32(config.seed), state.step.astype(jnp.uint32)])
    summed = sum_over_rows(local, make_mesh(config.mesh))
    return summed(batch, nvfp4.fold(key, 0), state.model, valid_tokens)


def _balanced_biases(model: Nemotron, report: LossReport, rate: float) -> dict[str, Array]:
    """Selection biases moved towards an even load, by the sign of each expert's deficit."""
    trained = trained_parameters(model)
    biases = {name: bias for name, bias in flatten(model).items() if name not in trained}
    moved, mtp_row = {}, 0
    for name, bias in biases.items():
        load = report.router_load
        if name.startswith("mtp_block."):
            load = report.mtp_router_load[mtp_row] if report.mtp_router_load.size else None
            mtp_row += 1
        moved[name] = bias if load is None else balance(bias, load, rate)
    return moved


def balance(
    bias: Float[Array, "... E"], load: Float[Array, "... E"], rate: float
) -> Float[Array, "... E"]:
    """`bias + rate * sign(mean load - load)`, the auxiliary-loss-free balancing of DeepSeek-V3."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def _worst_load(report: LossReport) -> Float[Array, ""]:
    """The fullest expert's tokens over the mean of its layer; the worst layer's."""
    load = report.router_load
    if load.size == 0:
        return jnp.ones(())
    return jnp.max(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9))
