"""Losses against another model's predictions, in place of the text's own tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.distill import DistillConfig, DraftObjective
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import PrecisionConfig
from nemotron_jax.config.run import TrainingConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.training.chunked import Chunked, Divergence
from nemotron_jax.training.losses import (
    Objective,
    PretrainTotals,
    Text,
    mean_nll,
    over_rows,
    pretrain_loss,
    pretrain_objective,
)
from nemotron_jax.types import Batch
from pallas_kernels import nvfp4

_CHOICE = 4096  # the choice of hidden states draws from streams of its own, past those of layers


def distill_objective(
    training: TrainingConfig, config: DistillConfig, teacher: Nemotron, execution: Execution
) -> Objective:
    """The pre-training loss of a run whose next tokens are those that a teacher predicts.

    The teacher's parameters are given to the step, and get no gradient.
    """
    plain = pretrain_objective(training, execution)

    def loss(
        model: Nemotron, part: Batch, totals: PretrainTotals, key: Array, teacher: Nemotron
    ) -> tuple:
        return pretrain_loss(
            model,
            part,
            training,
            execution,
            totals=totals,
            key=key,
            against=Teacher(config, teacher, teachers_execution(execution)),
        )

    return dataclasses.replace(plain, loss=loss, given=(teacher,))


def teachers_execution(execution: Execution) -> Execution:
    """How a run's teacher computes: as the run does, but in high precision and in the dtype of its
    own matrices."""
    return dataclasses.replace(execution, precision=PrecisionConfig(), compute_dtype="auto")


@dataclasses.dataclass(frozen=True)
class Teacher(Text):
    """The next token is compared with a teacher's prediction; drafts with the text."""

    config: DistillConfig
    teacher: Nemotron
    execution: Execution  # of the teacher

    def next_token(
        self, model: Nemotron, hidden: Array, batch: Batch, totals: PretrainTotals, chunk: int
    ) -> Float[Array, ""]:
        share, loss = self.config.weight, jnp.zeros(())
        if share > 0:
            output = self.teacher(
                batch.tokens, segment_ids=batch.segment_ids, execution=self.execution
            )
            weights = batch.weights[..., 0] / jnp.maximum(totals.valid_tokens[0], 1.0)
            how = Chunked(Divergence(self.config.temperature), chunk)
            fixed = jax.lax.stop_gradient(output.hidden)
            head, teachers = model.head.matrix(), self.teacher.head.matrix()
            loss += share * over_rows(head, hidden, fixed, weights, how, teachers)
        if share < 1:
            loss += (1 - share) * mean_nll(model, hidden, batch, 0, totals, chunk)
        return loss


@dataclasses.dataclass(frozen=True)
class Backbone(Text):
    """Drafts are compared with what the model itself predicts where they stand.

    Depth d at place t drafts token t + d + 1, which the backbone predicts from its hidden state at
    t + d. Where that lies past the row or in another document nothing is compared. Source: MTP
    boosting of Nemotron 3 Ultra, as field reports describe it; that the choice of hidden states is
    each token's own is this project's reading.
    """

    config: DraftObjective

    def weights(self, batch: Batch) -> Float[Array, "B T Z"]:
        """Without places whose prediction lies past the row."""
        distances = range(batch.weights.shape[-1])
        there = [_ahead(batch.weights, batch, distance)[1] for distance in distances]
        return jnp.where(jnp.stack(there, axis=-1), batch.weights, 0)

    def read(
        self, hiddens: Sequence[Array], batch: Batch, key: Array | None
    ) -> Float[Array, "B T D"]:
        """The hidden state that has read the tokens before the one to embed, of a depth drawn for
        each token: in decoding, the block's attention meets the states of all depths.

        Depth j has read them at a place d - 1 - j further on; where that lies in another document
        it is the last depth's.
        """
        last = jax.lax.stop_gradient(hiddens[-1]) if len(hiddens) == 1 else hiddens[-1]
        candidates = hiddens[1:]
        if self.config.mtp_hidden == "last" or len(candidates) < 2:
            return last
        drawn = _uniform(key, batch, len(hiddens))
        chosen = (drawn * len(candidates)).astype(jnp.int32)
        for number, hidden in enumerate(candidates[:-1]):
            further = len(candidates) - 1 - number
            ahead, there = _ahead(hidden, batch, further)
            last = jnp.where((there & (chosen == number))[..., None], ahead, last)
        return last

    def draft(
        self,
        model: Nemotron,
        hiddens: Sequence[Array],
        batch: Batch,
        totals: PretrainTotals,
        chunk: int,
    ) -> Float[Array, ""]:
        depth = len(hiddens) - 1
        fixed, _ = _ahead(jax.lax.stop_gradient(hiddens[0]), batch, depth)
        weights = self.weights(batch)[..., depth] / jnp.maximum(totals.valid_tokens[depth], 1.0)
        how = Chunked(Divergence(self.config.mtp_temperature), chunk)
        head = model.head.matrix()
        return over_rows(head, hiddens[-1], fixed, weights, how, jax.lax.stop_gradient(head))


def _ahead(
    hidden: Float[Array, "B T D"], batch: Batch, distance: int
) -> tuple[Float[Array, "B T D"], Any]:
    """Hidden states `distance` places further on, and whether these lie in the same document."""
    shifted = jnp.pad(hidden[:, distance:], ((0, 0), (0, distance), (0, 0)))
    segments: Int[Array, "B T"] = batch.segment_ids
    there = jnp.pad(segments[:, distance:], ((0, 0), (0, distance))) == segments
    return shifted, there & (segments > 0)


def _uniform(key: Array | None, batch: Batch, depth: int) -> Float[Array, "B T"]:
    """A number in [0, 1) for each token at one depth; by its number in the whole batch, so that
    neither micro-batches nor devices change it."""
    if key is None:
        raise ValueError(
            "objective.mtp_hidden='sampled' draws a depth for each token: pass a key, or set it to "
            "'last'"
        )
    numbers = batch.numbers
    if numbers is None:
        numbers = jnp.arange(batch.tokens.size).reshape(batch.tokens.shape)
    words = nvfp4.fold(nvfp4.key_words(key), _CHOICE + depth)
    return nvfp4.uniform(words, numbers.reshape(-1), 1).reshape(numbers.shape)
