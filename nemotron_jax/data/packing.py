"""Documents joined to one endless stream, cut in rows, and made into batches with their shifts."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from nemotron_jax.data import order
from nemotron_jax.data.held_out import mix64
from nemotron_jax.data.order import Documents, Order
from nemotron_jax.types import Batch

HELD_OUT_KEY = 0  # the order of held-out rows is the same in every run


@dataclasses.dataclass(frozen=True)
class DocumentTokens:
    """The ids of many documents end to end, each with its closing eos.

    Document d is tokens[offsets[d] : offsets[d + 1]]; none is empty. The array may be mapped
    from a file: only the rows that are read touch it.
    """

    tokens: Integer[np.ndarray, "N"]  # uint16, or uint32 for vocabularies above 65536
    offsets: Int[np.ndarray, "bounds"]

    def __post_init__(self) -> None:
        lengths = np.diff(self.offsets)
        whole = self.offsets[0] == 0 and self.offsets[-1] == len(self.tokens)
        if not (len(lengths) > 0 and whole and lengths.min() > 0):
            raise ValueError(
                f"DocumentTokens: offsets={self.offsets} do not cut {len(self.tokens)} tokens in "
                "non-empty documents; rebuild the corpus"
            )

    @property
    def token_count(self) -> int:
        """Tokens of all documents."""
        return len(self.tokens)

    @functools.cached_property
    def unit_tokens(self) -> Int[np.ndarray, "units"]:
        """The tokens of each run of order.UNIT_DOCUMENTS documents."""
        return np.diff(self.offsets[:-1][:: order.UNIT_DOCUMENTS], append=self.offsets[-1])

    def table(self, unit: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Tokens of each document of a unit, and where it begins."""
        first = unit * order.UNIT_DOCUMENTS
        bounds = self.offsets[first : first + order.UNIT_DOCUMENTS + 1]
        return np.diff(bounds), bounds[:-1]

    def piece(self, place: int, start: int, count: int) -> Integer[np.ndarray, "count"]:
        """Tokens start .. start + count of the document that begins at a place."""
        return self.tokens[place + start : place + start + count]

    def counts(self, size: int) -> Int[np.ndarray, "V"]:
        """How often each of `size` ids occurs."""
        return np.bincount(self.tokens, minlength=size)


class Row(NamedTuple):
    """Tokens of one row and the few after it, with the document that each belongs to.

    The look-ahead is only ever a target or an MTP input of the row's own tokens.
    """

    tokens: Int[np.ndarray, "read"]  # T and the look-ahead
    segments: Int[np.ndarray, "read"]  # counted from 1 within the row; 0 is padding
    weights: Float[np.ndarray, "read"] | None = None  # of each token as a target; None means 1


def lookahead_of(mtp_depths: int) -> int:
    """How many tokens past a row's end its targets reach."""
    return 1 + mtp_depths


class Stream:
    """An endless stream of one source's documents, newly shuffled at each epoch: see order.py.

    Reading costs two binary searches and the documents that are touched.
    """

    def __init__(self, documents: Documents, seed: int, source: int = 0) -> None:
        self._documents = documents
        key = mix64(mix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(source))
        self._order = Order(documents, key)

    def order(self, epoch: int) -> Int[np.ndarray, "documents"]:
        """The documents in the order of an epoch."""
        windows = range(len(self._order.window_ends(epoch)))
        return np.concatenate([self._order.window(epoch, n).documents for n in windows])

    def row(self, index: int, length: int, lookahead: int) -> Row:
        """Row `index` of the stream cut in rows of `length` tokens, with what follows it."""
        return self.read(index * length, length + lookahead)

    def read(self, start: int, count: int) -> Row:
        """`count` tokens of the stream from position `start` on."""
        tokens, segments = np.empty(count, np.int32), np.empty(count, np.int32)
        filled, segment = 0, 1
        for place, first, length in self._from(start):
            taken = min(length - first, count - filled)
            tokens[filled : filled + taken] = self._documents.piece(place, first, taken)
            segments[filled : filled + taken] = segment
            filled, segment = filled + taken, segment + 1
            if filled == count:
                return Row(tokens, segments)
        raise AssertionError("a stream has no end")

    def _from(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Place, first token and length of the documents from a position of the stream on."""
        epoch, rest = divmod(start, self._documents.token_count)
        ends = self._order.window_ends(epoch)
        number = int(np.searchsorted(ends, rest, side="right"))
        rest -= int(ends[number - 1]) if number else 0
        while True:
            window = self._order.window(epoch, number)
            ordinal = int(np.searchsorted(window.ends, rest, side="right"))
            begin = int(window.ends[ordinal - 1]) if ordinal else 0
            first = rest - begin
            for place, end in zip(window.places[ordinal:], window.ends[ordinal:], strict=True):
                yield int(place), first, int(end) - begin
                begin, first = int(end), 0
            number, rest = number + 1, 0
            if number == len(self._order.window_ends(epoch)):
                epoch, number = epoch + 1, 0


def count_rows(documents: DocumentTokens, length: int) -> int:
    """How many rows `pack_once` makes of the documents."""
    return -(-len(documents.tokens) // length)


def pack_once(documents: DocumentTokens, length: int, lookahead: int, rows: int) -> list[Row]:
    """The first `rows` rows of the documents, each taken once, in an order fixed for all runs.

    The last row of all is padded. With `count_rows` rows, each token that has a predecessor in
    its document is a target once.
    """
    stream = Stream(documents, HELD_OUT_KEY)
    packed = []
    for index in range(min(rows, count_rows(documents, length))):
        start = index * length
        count = min(length + lookahead, len(documents.tokens) - start)
        row = stream.read(start, count)
        padding = (0, length + lookahead - count)
        packed.append(Row(np.pad(row.tokens, padding), np.pad(row.segments, padding)))
    return packed


def empty_row(length: int, lookahead: int) -> Row:
    """A row of padding, to fill a batch."""
    return Row(np.zeros(length + lookahead, np.int32), np.zeros(length + lookahead, np.int32))


def make_batch(rows: Sequence[Row], mtp_depths: int) -> Batch:
    """The rows as NumPy arrays of a Batch, all shifts made.

    targets[..., k] is the token 1 + k further on and mtp_tokens[..., k - 1] the token k further
    on, where it belongs to the same document, also when it lies past the row's end: no pair of
    context and target is lost at a cut. Elsewhere both are 0, and so is the target's weight.
    A row's own weights go with its tokens, however far off they are predicted.
    """
    lookahead = lookahead_of(mtp_depths)
    tokens = np.stack([row.tokens for row in rows])
    segments = np.stack([row.segments for row in rows])
    worth = np.stack(
        [np.ones(row.tokens.shape) if row.weights is None else row.weights for row in rows]
    )
    length = tokens.shape[1] - lookahead
    own = segments[:, :length]
    shifted, weights = [], []
    for shift in range(1, lookahead + 1):
        same = (segments[:, shift : shift + length] == own) & (own > 0)
        shifted.append(np.where(same, tokens[:, shift : shift + length], 0))
        weights.append(np.where(same, worth[:, shift : shift + length], 0))
    targets = np.stack(shifted, axis=-1)
    return Batch(
        tokens=np.ascontiguousarray(tokens[:, :length]),
        targets=targets,
        mtp_tokens=np.ascontiguousarray(targets[..., :mtp_depths]),
        segment_ids=np.ascontiguousarray(own),
        weights=np.stack(weights, axis=-1).astype(np.float32),
    )
