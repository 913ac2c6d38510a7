"""The order in which an epoch reads documents, made window by window, so that memory is bounded."""

import functools
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Integer, UInt64

from nemotron_jax.data.held_out import mix64

# Documents that stand together in a corpus and come into the same window. Token shards keep the
# tokens of each unit: another number needs other shards, and a new order of every larger corpus.
UNIT_DOCUMENTS = 1 << 14
# Units that are drawn from all over the corpus and whose documents are shuffled together: 2^20
# documents, 24 bytes each in memory. A corpus of no more documents is shuffled as a whole.
WINDOW_UNITS = 64
_EPOCH_OF_UNITS = np.uint64(1)  # sets the order of units apart from that of documents


class Documents(Protocol):
    """Documents as ids, in memory or in files. `unit_tokens` counts the tokens of each unit."""

    token_count: int
    unit_tokens: Int[np.ndarray, "units"]

    def table(self, unit: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Tokens of each document of a unit, and a number by which `piece` finds it."""

    def piece(self, place: int, start: int, count: int) -> Integer[np.ndarray, "count"]:
        """Tokens start .. start + count of the document at a place."""


class Window(NamedTuple):
    """Documents in the order in which they are read."""

    documents: Int[np.ndarray, "n"]  # their numbers in the corpus
    places: Int[np.ndarray, "n"]
    ends: Int[np.ndarray, "n"]  # where each ends, in tokens from the window's start


class Order:
    """The documents of each epoch in an order that is a function of (key, epoch).

    The order is a hash of our own: NumPy does not promise the same permutations from version to
    version. Units are shuffled, and of each WINDOW_UNITS of them the documents. Two windows and the
    tables of two epochs, with one entry for each unit, are kept.
    """

    def __init__(self, documents: Documents, key: UInt64[np.ndarray, "1"]) -> None:
        self._documents = documents
        self._key = key
        self._units = functools.lru_cache(maxsize=2)(self._make_units)
        self.window = functools.lru_cache(maxsize=2)(self._make_window)

    def window_ends(self, epoch: int) -> Int[np.ndarray, "windows"]:
        """Where each window of an epoch ends, in tokens."""
        return self._units(epoch)[1]

    def _make_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._documents.unit_tokens
        numbers = np.arange(len(tokens), dtype=np.uint64)
        order = np.argsort(mix64(numbers ^ mix64(self._of(epoch) ^ _EPOCH_OF_UNITS)))
        last = np.minimum(
            np.arange(WINDOW_UNITS, len(tokens) + WINDOW_UNITS, WINDOW_UNITS), len(tokens)
        )
        return order, np.cumsum(tokens[order])[last - 1]

    def _make_window(self, epoch: int, number: int) -> Window:
        order, _ = self._units(epoch)
        units = np.sort(order[number * WINDOW_UNITS : (number + 1) * WINDOW_UNITS])
        tables = [self._documents.table(int(unit)) for unit in units]
        documents = np.concatenate(
            [
                unit * UNIT_DOCUMENTS + np.arange(len(lengths))
                for unit, (lengths, _) in zip(units, tables, strict=True)
            ]
        )
        lengths, places = (np.concatenate(part) for part in zip(*tables, strict=True))
        shuffled = np.argsort(mix64(documents.astype(np.uint64) ^ self._of(epoch)))
        return Window(documents[shuffled], places[shuffled], np.cumsum(lengths[shuffled]))

    def _of(self, epoch: int) -> UInt64[np.ndarray, "1"]:
        return mix64(self._key ^ np.uint64(epoch))
