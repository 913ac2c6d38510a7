"""Text that a model writes itself, as the batches of a training loop."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.loader import TrainLoader
from nemotron_jax.data.packing import Row, lookahead_of, make_batch
from nemotron_jax.decoding.generate import generate
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.posttraining.curriculum import step_seed
from nemotron_jax.types import Batch


class OwnText:
    """Batches whose rows begin as the corpus's and go on as the model draws them.

    One document a row: the beginning is read and not learned, and what follows its end is padding.
    `objective.own_steps` batches are written together, side by side. As long as the writing part of
    the model does not move, the batch of step n is a function of the config and of n.
    Raises ValueError where several processes train together.
    """

    def __init__(self, loader: TrainLoader, config: RunConfig) -> None:
        if (count := jax.process_count()) > 1:
            raise ValueError(
                f"RunConfig.objective.text='own': there are {count} processes of jax, and text is "
                "written by one; start one process that drives all devices, or use text='corpus'"
            )
        self._loader, self._config = loader, config
        self._step = 0
        self._written: tuple[int, list[Row]] = -1, []  # of which batches, and their rows

    def next_with(self, model: Nemotron) -> Batch:
        """The next batch, written by `model`."""
        config = self._config
        number, place = divmod(self._step, config.objective.own_steps)
        if self._written[0] != number:
            self._written = number, self._write(model, number)
        rows = config.data.batch_size
        part = self._written[1][place * rows : (place + 1) * rows]
        self._step += 1
        return make_batch(part, config.training.mtp_depths)

    def report(self) -> Mapping[str, float]:
        """`own_tokens`: how many tokens of the last batches' rows the model wrote, on average."""
        lengths = [float(row.weights.sum()) for row in self._written[1]]
        return {"own_tokens": sum(lengths) / max(len(lengths), 1)}

    def state(self) -> dict[str, Any]:
        """What was handed out, and of which corpus; the text is written anew."""
        return {"own_text": self._step, "corpus": self._loader.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after what `state` counts. Raises ValueError where it belongs to other data."""
        self._loader.restore(state.get("corpus", {}))
        self._step, self._written = state["own_text"], (-1, [])

    def _write(self, model: Nemotron, number: int) -> list[Row]:
        """The rows of batches that are written together."""
        config = self._config
        each, length = config.objective.own_steps, config.data.sequence_length
        steps = range(number * each, min((number + 1) * each, config.training.steps))
        count, eos = config.objective.prompt_tokens, config.model.eos_token
        batches = [self._loader.batch_at(step) for step in steps]
        starts = [start for batch in batches for start in beginnings(batch, count, eos)]
        total = length + lookahead_of(config.training.mtp_depths)
        written = generate(
            model,
            starts,
            total - min(map(len, starts)),
            temperature=1.0,
            stop_tokens=eos,
            seed=step_seed(config.seed, number),
            execution=config.execution.at_step(steps[0]),
        )
        return [
            _row(start, tokens[:length], total)
            for start, tokens, length in zip(starts, written.tokens, written.lengths, strict=True)
        ]


def beginnings(batch: Batch, count: int, eos: int) -> list[tuple[int, ...]]:
    """The first `count` tokens of each row that has some: of those the last document's, without
    its end."""
    found = []
    for tokens, segments in zip(batch.tokens[:, :count], batch.segment_ids[:, :count], strict=True):
        if not np.any(segments):
            continue
        last = tokens[segments == np.max(segments)].tolist()
        ends = len(last) > 1 and last[-1] == eos
        found.append(tuple(last[:-1] if ends else last))
    return found


def _row(beginning: Sequence[int], written: Int[np.ndarray, "N"], total: int) -> Row:
    """A row of one document, of which what was written is learned."""
    document = np.array([*beginning, *written], np.int32)[:total]
    padding = (0, total - len(document))
    weights = np.ones(len(document), np.float32)
    weights[: len(beginning)] = 0
    ones = np.ones(len(document), np.int32)
    return Row(np.pad(document, padding), np.pad(ones, padding), np.pad(weights, padding))
