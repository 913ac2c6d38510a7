"""Cross entropy in chunks, and the sum of losses that pre-training minimises."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import PrecisionConfig
from nemotron_jax.config.run import TrainingConfig
from nemotron_jax.layers.router import count_sequences
from nemotron_jax.model.nemotron import Nemotron, number_documents
from nemotron_jax.model.parameters import load_by_bias
from nemotron_jax.sharding import local
from nemotron_jax.sharding.vocabulary import Vocabulary
from nemotron_jax.sharding.weights import Cuts, cuts_of, gathered, scattered
from nemotron_jax.types import Batch, Weight

Sums = dict[str, Array | dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a train step minimises.

    `totals` are of the whole batch, so that the losses of its parts, each divided by them, add up
    to the whole's. `loss(model, part, totals, key)` gives the scalar and named sums to report:
    `loss` always, and where a model routes `router_load` and `mtp_router_load`, tokens of every
    expert by the name of the selection bias that balances them.
    """

    totals: Callable[[Batch], Any]
    loss: Callable[[Nemotron, Batch, Any, Array], tuple[Float[Array, ""], Sums]]
    precision: PrecisionConfig = PrecisionConfig()  # that `loss` computes in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PretrainTotals:
    """What a whole batch is divided by."""

    valid_tokens: Float[Array, "Z"]  # weights by prediction distance
    sequences: Float[Array, ""]  # of the balance loss


def pretrain_objective(training: TrainingConfig, execution: Execution) -> Objective:
    """The pre-training loss of a run, computed as a step is."""

    def totals(batch: Batch) -> PretrainTotals:
        return PretrainTotals(jnp.sum(batch.weights, axis=(0, 1)), _sequences(batch, execution))

    def loss(model: Nemotron, part: Batch, totals: PretrainTotals, key: Array) -> tuple:
        return pretrain_loss(model, part, training, execution, totals=totals, key=key)

    return Objective(totals, loss, execution.precision)


def pretrain_loss(
    model: Nemotron,
    batch: Batch,
    config: TrainingConfig,
    execution: Execution,
    *,
    totals: PretrainTotals,
    key: Array | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Next-token loss + MTP losses + sequence balance loss, as Nemotron 3 Super was pre-trained.

    `batch` is the whole batch of `totals` or a part of it; `key` is for stochastic rounding. The
    sums: `loss` in nats per token, `mtp_loss` the mean over depths and `aux_loss` the sum over MoE
    layers, both unscaled, and the routers' loads. Source: nemotron3_super report; Megatron-LM
    process_mtp_loss for the MTP weights.
    """
    output = model(
        batch.tokens,
        segment_ids=batch.segment_ids,
        key=key,
        numbers=batch.numbers,
        execution=execution,
    )
    loss = _mean_nll(model, output.hidden, batch, 0, totals, config.loss_chunk)
    aux_loss, hidden, mtp_loss = output.aux_loss, output.hidden, jnp.zeros(())
    mtp_load: dict[str, Array] = {}
    for depth in range(1, config.mtp_depths + 1):
        step = model.mtp_step(
            hidden, batch.mtp_tokens[..., depth - 1], batch.segment_ids, execution=execution
        )
        hidden = step.hidden
        nll = _mean_nll(model, hidden, batch, depth, totals, config.loss_chunk)
        mtp_loss += nll / config.mtp_depths
        aux_loss += step.aux_loss
        load = load_by_bias(model, step.router_load, mtp=True)
        mtp_load = {name: mtp_load.get(name, 0) + one for name, one in load.items()}
    aux_loss *= _sequences(batch, execution) / jnp.maximum(totals.sequences, 1)
    total = loss + config.mtp_loss_scale * mtp_loss + config.aux_loss_scale * aux_loss
    sums = {"loss": loss, "mtp_loss": mtp_loss, "aux_loss": aux_loss}
    load = load_by_bias(model, output.router_load)
    sums |= {"router_load": load, "mtp_router_load": mtp_load}
    return total, jax.lax.stop_gradient(sums)


def _sequences(batch: Batch, execution: Execution) -> Float[Array, ""]:
    documents = None
    if execution.aux_loss == "documents":
        documents = number_documents(batch.segment_ids)
    return count_sequences(documents, batch.segment_ids != 0)


def _mean_nll(
    model: Nemotron,
    hidden: Array,
    batch: Batch,
    distance: int,
    totals: PretrainTotals,
    chunk: int,
) -> Float[Array, ""]:
    """Cross entropy of the tokens `distance` + 1 further on, each device's rows by itself."""
    weights = batch.weights[..., distance] / jnp.maximum(totals.valid_tokens[distance], 1.0)
    head = model.head.matrix()
    cuts = cuts_of(head)

    def own(hidden: Array, part: Array, targets: Array, weights: Array) -> Float[Array, "devices"]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return weighted_nll(flat, part, targets.reshape(-1), weights.reshape(-1), chunk, cuts)[None]

    by_row = ("batch",)
    run = local(own, (by_row, head, by_row, by_row), by_row)
    return jnp.sum(run(hidden, head.value, batch.targets[..., distance], weights))


def token_nll(
    hidden: Float[Array, "B T D"],
    head: Weight,
    targets: Int[Array, "B T"],
    chunk: int = 512,
) -> Float[Array, "B T"]:
    """Cross entropy of each token's target in nats, float32, of each device's rows by itself.

    Never holds more than [chunk, V] logits: the backward pass makes them anew. Differentiable in
    `hidden` and the head's value.
    """
    cuts = cuts_of(head)

    def own(hidden: Array, part: Array, targets: Array) -> Float[Array, "B T"]:
        matrix = gathered(part, cuts, hidden.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        count = flat.shape[0]
        rows, labels, _ = _chunks(flat, targets.reshape(-1), jnp.zeros(count), chunk)
        vocabulary = Vocabulary.of(cuts, 1)
        each = jax.checkpoint(lambda rows, labels: _chunk_nll(rows, labels, matrix, vocabulary)[0])
        nll = jax.lax.scan(lambda _, part: (None, each(*part)), None, (rows, labels))[1]
        return nll.reshape(-1)[:count].reshape(targets.shape)

    by_row = ("batch",)
    return local(own, (by_row, head, by_row), by_row)(hidden, head.value, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nll(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D _"],
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    chunk: int,
    cuts: Cuts = Cuts(),
) -> Float[Array, ""]:
    """Sum of weights times cross entropy, never holding more than [chunk, V] logits; float32.

    Inside `local`, `head` may be this device's part, cut as `cuts` say. Differentiable in
    `hidden` and `head`. Its gradient is made in the same pass as the loss, while a chunk's logits
    are at hand, so that no logits are computed twice; until the backward pass asks for it, each
    device keeps its part of the head's.
    """
    head, vocabulary = gathered(head, cuts, hidden.dtype), Vocabulary.of(cuts, 1)

    def add(total: Array, part: tuple) -> tuple[Array, None]:
        rows, labels, weight = part
        return total + jnp.sum(_chunk_nll(rows, labels, head, vocabulary)[0] * weight), None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(hidden, targets, weights, chunk))[0]


def _nll_forward(
    hidden: Array, part: Array, targets: Array, weights: Array, chunk: int, cuts: Cuts
) -> tuple[Array, tuple]:
    head = gathered(part, cuts, hidden.dtype)
    matrix, vocabulary = head.astype(hidden.dtype), Vocabulary.of(cuts, 1)

    def add(carry: tuple, part: tuple) -> tuple[tuple, Array]:
        total, dhead = carry
        rows, labels, weight = part
        nll, probabilities = _chunk_nll(rows, labels, head, vocabulary)
        hit = vocabulary.is_token(labels, head.shape[1])
        dlogits = ((probabilities - hit) * weight[:, None]).astype(hidden.dtype)
        dhead += jnp.einsum("nd,nv->dv", rows, dlogits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(nll * weight), dhead), jnp.einsum("nv,dv->nd", dlogits, matrix)

    start = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32))
    parts = _chunks(hidden, targets, weights, chunk)
    (total, dhead), dhidden = jax.lax.scan(add, start, parts)
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (dhidden.astype(hidden.dtype), scattered(dhead, cuts).astype(part.dtype))


def _nll_backward(chunk: int, cuts: Cuts, residuals: tuple, cotangent: Array) -> tuple:
    dhidden, dhead = residuals
    # The loss is the same on all devices that share the vocabulary: each is given its share of the
    # cotangent.
    cotangent = Vocabulary.of(cuts, 1).sum(cotangent)
    return dhidden * cotangent.astype(dhidden.dtype), dhead * cotangent, None, None


weighted_nll.defvjp(_nll_forward, _nll_backward)


def _chunk_nll(
    rows: Array, labels: Array, head: Array, vocabulary: Vocabulary
) -> tuple[Array, Array]:
    """The cross entropy of each of one chunk's tokens, and this device's part of their softmax."""
    matrix = head.astype(rows.dtype)
    logits = jnp.einsum("nd,dv->nv", rows, matrix, preferred_element_type=jnp.float32)
    top = vocabulary.max(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - top)
    total = vocabulary.sum(jnp.sum(exponentials, axis=-1, keepdims=True))
    chosen = vocabulary.of_tokens(logits, labels)
    return (jnp.log(total) + top - chosen)[:, 0], exponentials / total


def _chunks(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple:
    """Rows in chunks; the last one is filled up with rows of weight 0."""
    count = hidden.shape[0]
    chunk = min(chunk, count)
    missing = -count % chunk
    pad = lambda a: jnp.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1))
    return tuple(pad(a).reshape(-1, chunk, *a.shape[1:]) for a in (hidden, targets, weights))
