"""Cross entropy in chunks, and the sum of losses that pre-training minimises."""

import dataclasses
from collections.abc import Callable, Sequence
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
from nemotron_jax.sharding.weights import cuts_of, gathered, whole
from nemotron_jax.training.chunked import (
    Chunked,
    cross_entropy,
    in_chunks,
    weighted_loss,
)
from nemotron_jax.types import Batch, Weight

Sums = dict[str, Array | dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a train step minimises.

    `totals` are of the whole batch, so that the losses of its parts, each divided by them, add up
    to the whole's. `loss(model, part, totals, key)` gives the scalar and named sums to report:
    `loss` always, and where a model routes `router_load` and `mtp_router_load`, tokens of every
    expert by the name of the selection bias that balances them. What is `given` beside, such as a
    teacher, comes after the key: arguments of the compiled step, which would hold a copy of them.
    """

    totals: Callable[[Batch], Any]
    loss: Callable[..., tuple[Float[Array, ""], Sums]]
    precision: PrecisionConfig = PrecisionConfig()  # that `loss` computes in
    given: tuple[Any, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PretrainTotals:
    """What a whole batch is divided by."""

    valid_tokens: Float[Array, "Z"]  # weights by prediction distance
    sequences: Float[Array, ""]  # of the balance loss


class Text:
    """What predictions are compared with: the text itself."""

    def weights(self, batch: Batch) -> Float[Array, "B T Z"]:
        """What each comparison counts, by prediction distance."""
        return batch.weights

    def next_token(
        self, model: Nemotron, hidden: Array, batch: Batch, totals: PretrainTotals, chunk: int
    ) -> Float[Array, ""]:
        """The loss of the next token in nats; `hidden` is the backbone's."""
        return mean_nll(model, hidden, batch, 0, totals, chunk)

    def read(
        self, hiddens: Sequence[Array], batch: Batch, key: Array | None
    ) -> Float[Array, "B T D"]:
        """What the next depth of drafts reads, of the backbone's hidden states and those of the
        depths before it."""
        return hiddens[-1]

    def draft(
        self,
        model: Nemotron,
        hiddens: Sequence[Array],
        batch: Batch,
        totals: PretrainTotals,
        chunk: int,
    ) -> Float[Array, ""]:
        """The loss of the last depth of drafts."""
        return mean_nll(model, hiddens[-1], batch, len(hiddens) - 1, totals, chunk)


TEXT = Text()


def pretrain_objective(
    training: TrainingConfig, execution: Execution, against: Text = TEXT
) -> Objective:
    """The pre-training loss of a run, computed as a step is."""

    def totals(batch: Batch) -> PretrainTotals:
        return PretrainTotals(
            jnp.sum(against.weights(batch), axis=(0, 1)), _sequences(batch, execution)
        )

    def loss(model: Nemotron, part: Batch, totals: PretrainTotals, key: Array) -> tuple:
        return pretrain_loss(
            model, part, training, execution, totals=totals, key=key, against=against
        )

    return Objective(totals, loss, execution.precision)


def pretrain_loss(
    model: Nemotron,
    batch: Batch,
    config: TrainingConfig,
    execution: Execution,
    *,
    totals: PretrainTotals,
    key: Array | None = None,
    against: Text = TEXT,
) -> tuple[Float[Array, ""], Sums]:
    """Next-token loss + MTP losses + sequence balance loss, as Nemotron 3 Super was pre-trained.

    `batch` is the whole batch of `totals` or a part of it; `key` is for stochastic rounding;
    `against` is what predictions are compared with. The sums: `loss` in nats per token, `mtp_loss`
    the mean over depths and `aux_loss` the sum over MoE layers, both unscaled, and the routers'
    loads. Source: nemotron3_super report; Megatron-LM process_mtp_loss for the MTP weights.
    """
    output = model(
        batch.tokens,
        segment_ids=batch.segment_ids,
        key=key,
        numbers=batch.numbers,
        execution=execution,
    )
    loss = against.next_token(model, output.hidden, batch, totals, config.loss_chunk)
    aux_loss, hiddens, mtp_loss = output.aux_loss, [output.hidden], jnp.zeros(())
    mtp_load: dict[str, Array] = {}
    for depth in range(1, config.mtp_depths + 1):
        hidden, tokens = against.read(hiddens, batch, key), batch.mtp_tokens[..., depth - 1]
        step = model.mtp_step(hidden, tokens, batch.segment_ids, execution=execution)
        hiddens.append(step.hidden)
        nll = against.draft(model, hiddens, batch, totals, config.loss_chunk)
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


def mean_nll(
    model: Nemotron,
    hidden: Float[Array, "B T D"],
    batch: Batch,
    distance: int,
    totals: PretrainTotals,
    chunk: int,
) -> Float[Array, ""]:
    """Cross entropy of the tokens `distance` + 1 further on."""
    weights = batch.weights[..., distance] / jnp.maximum(totals.valid_tokens[distance], 1.0)
    targets = batch.targets[..., distance]
    return over_rows(model.head.matrix(), hidden, targets, weights, Chunked(cross_entropy, chunk))


def over_rows(
    head: Weight,
    hidden: Float[Array, "B T D"],
    wanted: Array,
    weights: Float[Array, "B T"],
    how: Chunked,
    given: Weight | None = None,
) -> Float[Array, ""]:
    """`weighted_loss` of tokens, each device's rows by itself; `wanted` is [B, T, ...].

    `given` is the head that what is wanted goes through, which gets no gradient.
    """
    how = dataclasses.replace(how, cuts=cuts_of(head))

    def own(hidden: Array, part: Array, wanted: Array, weights: Array, *held: Array) -> Array:
        rows = [array.reshape(-1, *array.shape[2:]) for array in (hidden, wanted)]
        matrix = _whole(held, given, wanted.dtype)
        return weighted_loss(rows[0], part, rows[1], matrix, weights.reshape(-1), how)[None]

    by_row, held = ("batch",), _held(head, given)
    run = local(own, (by_row, head, by_row, by_row, *held), by_row)
    return jnp.sum(run(hidden, head.value, wanted, weights, *(one.value for one in held)))


def token_losses(
    head: Weight,
    hidden: Float[Array, "B T D"],
    wanted: Array,
    how: Chunked,
    given: Weight | None = None,
) -> Float[Array, "B T"]:
    """The loss of each token, float32, of each device's rows by itself; see `over_rows`.

    Never holds more than [chunk, V] logits: the backward pass makes them anew. Differentiable in
    `hidden` and the head's value.
    """
    cuts = cuts_of(head)

    def own(hidden: Array, part: Array, wanted: Array, *held: Array) -> Float[Array, "B T"]:
        matrix, vocabulary = gathered(part, cuts, hidden.dtype), Vocabulary.of(cuts, 1)
        rows = tuple(array.reshape(-1, *array.shape[2:]) for array in (hidden, wanted))
        fixed = _whole(held, given, wanted.dtype)
        each = jax.checkpoint(
            lambda rows, wanted: how.loss_of(rows, matrix, wanted, fixed, vocabulary)[0]
        )
        parts = in_chunks(rows, how.chunk)
        losses = jax.lax.scan(lambda _, part: (None, each(*part)), None, parts)[1]
        return losses.reshape(-1)[: len(rows[0])].reshape(hidden.shape[:2])

    by_row, held = ("batch",), _held(head, given)
    run = local(own, (by_row, head, by_row, *held), by_row)
    return run(hidden, head.value, wanted, *(one.value for one in held))


def token_nll(
    hidden: Float[Array, "B T D"],
    head: Weight,
    targets: Int[Array, "B T"],
    chunk: int = 512,
) -> Float[Array, "B T"]:
    """Cross entropy of each token's target in nats: `token_losses` of the targets."""
    return token_losses(head, hidden, targets, Chunked(cross_entropy, chunk))


def _held(head: Weight, given: Weight | None) -> tuple[Weight, ...]:
    """The head of what is wanted, cut along the vocabulary as the own one is."""
    same = given is None or cuts_of(head).along(1) == cuts_of(given).along(1)
    assert same, "both heads have one vocabulary"
    return () if given is None else (given,)


def _whole(parts: Sequence[Array], given: Weight | None, dtype: jnp.dtype) -> Array | None:
    """The matrix of `given` from this device's part of it, if there is one."""
    return None if given is None else whole(parts[0], cuts_of(given), dtype)
