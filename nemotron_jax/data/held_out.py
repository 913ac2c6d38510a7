"""The split of documents into training and held-out text, and the near-duplicate filter."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

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
        raise ValueError(
            f"held-out text of {[c.source for c in collections]}: all {len(dropped)} candidates "
            f"share more than {LARGEST_SHARED_FRACTION:.0%} of their {GRAM_WORDS}-word sequences "
            "with training text; remove duplicates, add text, or raise data.held_out_fraction"
        )
    return Split(train, held_out, dropped)


def shared_gram_fractions(
    candidates: Sequence[Document], training: Sequence[Document]
) -> np.ndarray:
    """For each candidate, the fraction of its distinct 13-grams that occur in `training`.

    Grams are compared as 64-bit hashes. Only the candidates' grams are kept in memory.
    """
    words: dict[str, int] = {}
    for document in candidates:
        for word in document.text.split():
            words.setdefault(word, len(words) + 2)  # 0 pads short documents, 1 is any other word
    grams = [_grams(document.text, words) for document in candidates]
    known = np.unique(np.concatenate(grams)) if grams else np.zeros(0, np.uint64)
    seen = np.zeros(len(known), bool)
    for document in training:
        found = _grams(document.text, words)
        places = np.minimum(np.searchsorted(known, found), len(known) - 1)
        seen[places[known[places] == found]] = True
    return np.array([seen[np.searchsorted(known, own)].mean() for own in grams])


def _split_one(
    collection: Collection, fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    documents = collection.documents
    if len(documents) == 1:
        return _cut(collection.source, documents[0], fraction)
    draws = [_uniform(document.name) for document in documents]
    border = min(max(fraction, min(draws)), sorted(draws)[-2])  # neither part empty
    return (
        tuple(d for d, draw in zip(documents, draws, strict=True) if draw > border),
        tuple(d for d, draw in zip(documents, draws, strict=True) if draw <= border),
    )


def _uniform(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(
    source: str, document: Document, fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    text = document.text
    place = text.rfind("\n", 0, round(len(text) * (1 - fraction))) + 1
    if not text[:place].strip() or not text[place:].strip():
        raise ValueError(
            f"data source {source!r}: its one document {document.name} has no line end at which "
            f"to hold out the last {fraction:.0%}; give at least two documents"
        )
    return (
        (Document(text[:place], f"{document.name}#train"),),
        (Document(text[place:], f"{document.name}#held_out"),),
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
