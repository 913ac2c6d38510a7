"""The split of documents into training and held-out text, and the near-duplicate filter."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from nemotron_jax.data.sources import Collection, Document

GRAM_WORDS = 13
LARGEST_SHARED_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class Split:
    """Training documents of each source, held-out documents of all, and what the filter dropped."""

    train: tuple[tuple[Document, ...], ...]
    held_out: tuple[Document, ...]
    dropped: tuple[str, ...]


def split_documents(collections: Sequence[Collection], held_out_fraction: float) -> Split:
    """Each document in the training or the held-out part, by a hash of its name alone.

    No seed enters: a document held out once is held out in every run. Where the hash leaves a part
    of a source empty, the document nearest to the border moves there; a source of one document is
    cut at a line end, and its last `held_out_fraction` is held out.

    A held-out document is dropped when more than LARGEST_SHARED_FRACTION of its distinct
    GRAM_WORDS-grams occur in training text. Words are what `str.split()` gives; a document of
    fewer words counts as one gram. Raises ValueError when nothing is left to hold out.
    """
    parts = [_split_one(collection, held_out_fraction) for collection in collections]
    train = tuple(part for part, _ in parts)
    candidates = [document for _, part in parts for document in part]
    shared = shared_gram_fractions(candidates, [document for part in train for document in part])
    keep = shared <= LARGEST_SHARED_FRACTION
    held_out = tuple(d for d, kept in zip(candidates, keep, strict=True) if kept)
    dropped = tuple(d.name for d, kept in zip(candidates, keep, strict=True) if not kept)
    if not held_out:
        raise nothing_left([collection.source for collection in collections], len(dropped))
    return Split(train, held_out, dropped)


def nothing_left(sources: Sequence[str], dropped: int) -> ValueError:
    """The error of sources whose held-out documents all repeat training text."""
    return ValueError(
        f"held-out text of {list(sources)}: all {dropped} candidates "
        f"share more than {LARGEST_SHARED_FRACTION:.0%} of their {GRAM_WORDS}-word sequences "
        "with training text; remove duplicates, add text, or raise data.held_out_fraction"
    )


def shared_gram_fractions(
    candidates: Sequence[Document], training: Sequence[Document]
) -> np.ndarray:
    """For each candidate, the fraction of its distinct 13-grams that occur in `training`.

    Grams are compared as 64-bit hashes. Only the candidates' grams are kept in memory.
    """
    grams = Grams.of([document.text for document in candidates])
    seen = np.zeros(len(grams.known), bool)
    for document in training:
        seen[grams.found_in(document.text)] = True
    return grams.fractions(seen)


@dataclasses.dataclass(frozen=True)
class Grams:
    """The distinct 13-grams of candidate texts, to be looked for in other texts."""

    words: dict[str, int]
    known: UInt64[np.ndarray, "known"]  # sorted hashes
    own: tuple[Int[np.ndarray, "distinct"], ...]  # of each candidate, as places in `known`

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Grams":
        """The grams of some texts, in the order of the texts."""
        words: dict[str, int] = {}
        for text in texts:
            for word in text.split():
                words.setdefault(word, len(words) + 2)  # 0 pads short texts, 1 is any other word
        grams = [_grams(text, words) for text in texts]
        known = np.unique(np.concatenate(grams)) if grams else np.zeros(0, np.uint64)
        return cls(words, known, tuple(np.searchsorted(known, one) for one in grams))

    def found_in(self, text: str) -> Int[np.ndarray, "found"]:
        """Places in `known` of the grams that occur in a text."""
        found = _grams(text, self.words)
        places = np.minimum(np.searchsorted(self.known, found), len(self.known) - 1)
        return places[self.known[places] == found]

    def fractions(self, seen: Bool[np.ndarray, "known"]) -> Float[np.ndarray, "candidates"]:
        """For each candidate, the fraction of its grams that were seen."""
        return np.array([seen[places].mean() for places in self.own])


@dataclasses.dataclass
class Draws:
    """How many documents a source has, and the lowest and the two highest of their numbers."""

    count: int = 0
    lowest: float = 1.0
    highest: tuple[float, float] = (-1.0, -1.0)  # rising

    def add(self, name: str) -> float:
        """A document's number in [0, 1), by its name alone."""
        draw = _uniform(name)
        self.join(Draws(1, draw, (-1.0, draw)))
        return draw

    def join(self, other: "Draws") -> None:
        """Count the documents of another part of the source among these."""
        self.count += other.count
        self.lowest = min(self.lowest, other.lowest)
        _, _, second, first = sorted((*self.highest, *other.highest))
        self.highest = (second, first)


@dataclasses.dataclass(frozen=True)
class Border:
    """Which part each document of a source belongs to."""

    source: str
    fraction: float
    highest: float | None  # number of the last document held out; None: one document, to be cut

    @classmethod
    def of(cls, source: str, draws: Draws, fraction: float) -> "Border":
        """The border of a source: at `fraction` of its documents' draws, but with at least one
        document on each side. A single document is split inside (`highest` is None)."""
        if draws.count == 1:
            return cls(source, fraction, None)
        return cls(source, fraction, min(max(fraction, draws.lowest), draws.highest[0]))

    def parts(self, document: Document) -> tuple[Document | None, Document | None]:
        """What is for training and what is held out of a document."""
        if self.highest is None:
            return _cut(self.source, document, self.fraction)
        return (document, None) if _uniform(document.name) > self.highest else (None, document)


def _split_one(
    collection: Collection, fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    draws = Draws()
    for document in collection.documents:
        draws.add(document.name)
    border = Border.of(collection.source, draws, fraction)
    train, held_out = zip(*map(border.parts, collection.documents), strict=True)
    return tuple(filter(None, train)), tuple(filter(None, held_out))


def _uniform(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(source: str, document: Document, fraction: float) -> tuple[Document, Document]:
    text = document.text
    place = text.rfind("\n", 0, round(len(text) * (1 - fraction))) + 1
    if not text[:place].strip() or not text[place:].strip():
        raise ValueError(
            f"data source {source!r}: its one document {document.name} has no line end at which "
            f"to hold out the last {fraction:.0%}; give at least two documents"
        )
    return (
        Document(text[:place], f"{document.name}#train"),
        Document(text[place:], f"{document.name}#held_out"),
    )


def _grams(text: str, words: dict[str, int]) -> UInt64[np.ndarray, "distinct"]:
    parts = text.split()
    ids = np.zeros(max(len(parts), GRAM_WORDS), np.uint64)
    ids[: len(parts)] = [words.get(word, 1) for word in parts]
    mixed = mix64(ids)
    count = len(ids) - GRAM_WORDS + 1
    grams = np.zeros(count, np.uint64)
    for place in range(GRAM_WORDS):
        grams = mix64(grams ^ mixed[place : place + count])
    return np.unique(grams)


def mix64(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """A fixed random-looking permutation of the 64-bit integers.

    Source: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
