"""Cross entropy in chunks, and the sum of losses that pre-training minimises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import TrainingConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.types import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossReport:
    """Sums over the tokens of one micro-batch, each already divided by the whole batch's valid
    tokens."""

    loss: Float[Array, ""]  # nats per token of the next-token loss
    mtp_loss: Float[Array, ""]  # mean over depths, unscaled
    aux_loss: Float[Array, ""]  # sum over MoE layers, unscaled
    router_load: Float[Array, "layers E"]
    mtp_router_load: Float[Array, "mtp_layers E"]  # summed over depths


def pretrain_loss(
    model: Nemotron,
    batch: Batch,
    config: TrainingConfig,
    execution: Execution,
    *,
    valid_tokens: Float[Array, "Z"],
    share: float = 1.0,
    key: Array | None = None,
) -> tuple[Float[Array, ""], LossReport]:
    """Next-token loss + MTP losses + sequence balance loss, as Nemotron 3 Super was pre-trained.

    `valid_tokens` are the weights of the whole batch by prediction distance; a micro-batch's losses
    then add up to the batch's. `share` is the micro-batch's part of the batch's rows; `key` is for
    stochastic rounding. Source: nemotron3_super report; Megatron-LM process_mtp_loss for the MTP
    weights.
    """
    output = model(batch.tokens, segment_ids=batch.segment_ids, key=key, execution=execution)
    nll = functools.partial(_mean_nll, model, config=config, execution=execution)
    loss = nll(output.hidden, batch, 0, valid_tokens)
    aux_loss, hidden, mtp_loss = output.aux_loss, output.hidden, jnp.zeros(())
    mtp_load = jnp.zeros((0, 0))
    for depth in range(1, config.mtp_depths + 1):
        step = model.mtp_step(
            hidden, batch.mtp_tokens[..., depth - 1], batch.segment_ids, execution=execution
        )
        hidden = step.hidden
        mtp_loss += nll(hidden, batch, depth, valid_tokens) / config.mtp_depths
        aux_loss += step.aux_loss
        mtp_load = step.router_load if depth == 1 else mtp_load + step.router_load
    total = loss + config.mtp_loss_scale * mtp_loss + config.aux_loss_scale * aux_loss * share
    report = LossReport(loss, mtp_loss, aux_loss * share, output.router_load, mtp_load)
    return total, jax.lax.stop_gradient(report)


def _mean_nll(
    model: Nemotron,
    hidden: Array,
    batch: Batch,
    distance: int,
    valid_tokens: Array,
    *,
    config: TrainingConfig,
    execution: Execution,
) -> Float[Array, ""]:
    weights = batch.weights[..., distance] / jnp.maximum(valid_tokens[distance], 1.0)
    return weighted_nll(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head.weight[...],
        batch.targets[..., distance].reshape(-1),
        weights.reshape(-1),
        config.loss_chunk,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weights times cross entropy, never holding more than [chunk, V] logits; float32.

    Differentiable in `hidden` and `head`. Its gradient is made in the same pass as the loss, while
    a chunk's logits are at hand, so that no logits are computed twice.
    """

    def add(total: Array, part: tuple) -> tuple[Array, None]:
        return total + _chunk_nll(part, head)[0], None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(hidden, targets, weights, chunk))[0]


def _nll_forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, tuple]:
    matrix = head.astype(hidden.dtype)

    def add(carry: tuple, part: tuple) -> tuple[tuple, Array]:
        total, dhead = carry
        value, probabilities = _chunk_nll(part, head)
        rows, labels, weight = part
        hit = jnp.arange(head.shape[1]) == labels[:, None]
        dlogits = ((probabilities - hit) * weight[:, None]).astype(hidden.dtype)
        dhead += jnp.einsum("nd,nv->dv", rows, dlogits, preferred_element_type=jnp.float32)
        return (total + value, dhead), jnp.einsum("nv,dv->nd", dlogits, matrix)

    start = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32))
    parts = _chunks(hidden, targets, weights, chunk)
    (total, dhead), dhidden = jax.lax.scan(add, start, parts)
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (dhidden.astype(hidden.dtype), dhead.astype(head.dtype))


def _nll_backward(chunk: int, residuals: tuple, cotangent: Array) -> tuple:
    dhidden, dhead = residuals
    return dhidden * cotangent.astype(dhidden.dtype), dhead * cotangent, None, None


weighted_nll.defvjp(_nll_forward, _nll_backward)


def _chunk_nll(part: tuple, head: Array) -> tuple[Array, Array]:
    """Weighted sum of one chunk's cross entropies, and its softmax."""
    rows, labels, weight = part
    matrix = head.astype(rows.dtype)
    logits = jnp.einsum("nd,dv->nv", rows, matrix, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    nll = (jnp.log(total) + top - chosen)[:, 0]
    return jnp.sum(nll * weight), exponentials / total


def _chunks(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple:
    """Rows in chunks; the last one is filled up with rows of weight 0."""
    count = hidden.shape[0]
    chunk = min(chunk, count)
    missing = -count % chunk
    pad = lambda a: jnp.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1))
    return tuple(pad(a).reshape(-1, chunk, *a.shape[1:]) for a in (hidden, targets, weights))
