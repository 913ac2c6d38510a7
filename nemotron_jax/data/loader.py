"""Batches of a run, by step: the same global batch whatever the number of hosts."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain

from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.conversations import ChatCorpus
from nemotron_jax.data.corpus import Corpus
from nemotron_jax.data.mixture import Mixture
from nemotron_jax.data.packing import (
    Row,
    count_rows,
    empty_row,
    lookahead_of,
    make_batch,
    pack_once,
)
from nemotron_jax.types import Batch

FORMAT_VERSION = 1
ENDLESS_STEPS = 1 << 40  # grain wants a length; no run gets there


class TrainLoader:
    """An endless iterator of this host's rows of each step's batch, made ahead in one thread.

    Global row r is a function of (corpus, source weights, sequence length, seed, r). Step s has
    rows s * batch_size onwards, of which this host takes those of the numbers `rows`, all of them
    by default. The arrays are NumPy's.
    """

    def __init__(
        self,
        corpus: Corpus | ChatCorpus,
        data: DataConfig,
        seed: int,
        mtp_depths: int,
        *,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._rows = range(data.batch_size) if rows is None else rows
        self._data = data
        self._mtp_depths = mtp_depths
        self._mixture = Mixture(data.source_weights)
        self._streams = corpus.streams(seed)
        # what a saved position is a position in
        self._identity = {
            "corpus": corpus.fingerprint,
            "seed": seed,
            "batch_size": data.batch_size,
            "sequence_length": data.sequence_length,
            "source_weights": list(data.source_weights),
        }
        self._dataset = (
            grain.MapDataset.range(ENDLESS_STEPS * len(self._rows))
            .map(self._local_row)
            .batch(len(self._rows), batch_fn=lambda rows: make_batch(rows, mtp_depths))
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
        )
        self._iterator = iter(self._dataset)
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, without moving the iterator."""
        first = step * len(self._rows)
        rows = [self._local_row(index) for index in range(first, first + len(self._rows))]
        return make_batch(rows, self._mtp_depths)

    def global_row(self, index: int) -> Row:
        """Row `index` of the run, with the tokens its targets reach past its end."""
        source, row = self._mixture.place(index)
        length = self._data.sequence_length
        return self._streams[source].row(row, length, lookahead_of(self._mtp_depths))

    def state(self) -> dict[str, Any]:
        """The position after the last batch handed out, the same on every host; JSON-able."""
        return {
            "format_version": FORMAT_VERSION,
            "step": self._step,
            "source_rows": self._mixture.counters(self._step * self._data.batch_size),
            "grain": self._iterator.get_state(),
            **self._identity,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state, also one saved with another number of hosts.

        Raises ValueError naming the fields in which the state belongs to other data.
        """
        step = state.get("step")
        expected = {"format_version": FORMAT_VERSION, **self._identity}
        if isinstance(step, int):
            rows = step * self._data.batch_size
            expected["source_rows"] = self._mixture.counters(rows)
        wrong = [
            f"{field}={state.get(field)!r} here {value!r}"
            for field, value in expected.items()
            if state.get(field) != value
        ]
        if wrong or not isinstance(step, int) or "grain" not in state:
            raise ValueError(
                f"TrainLoader: the saved data position does not fit this run "
                f"({'; '.join(wrong) or 'step or grain state is missing'}); "
                "restore the data configuration, or start in a new directory"
            )
        self._iterator.set_state(state["grain"])
        self._step = step

    def close(self) -> None:
        """Stops the reading thread."""
        self._iterator.close()

    def _local_row(self, index: int) -> Row:
        step, place = divmod(index, len(self._rows))
        return self.global_row(step * self._data.batch_size + self._rows[place])


def held_out_batches(corpus: Corpus, data: DataConfig, mtp_depths: int, rows: int) -> list[Batch]:
    """The first `rows` held-out rows, in batches of data.batch_size.

    Fewer when the text has fewer rows; the same rows in every run of this data. The last row and
    the last batch are filled with padding, so that all batches have one shape.
    """
    length, lookahead = data.sequence_length, lookahead_of(mtp_depths)
    packed = pack_once(corpus.held_out, length, lookahead, rows)
    packed += [empty_row(length, lookahead)] * (-len(packed) % data.batch_size)
    return [
        make_batch(packed[start : start + data.batch_size], mtp_depths)
        for start in range(0, len(packed), data.batch_size)
    ]


def held_out_row_count(corpus: Corpus, data: DataConfig) -> int:
    """How many rows the whole held-out text fills."""
    return count_rows(corpus.held_out, data.sequence_length)
