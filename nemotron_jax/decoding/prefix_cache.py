"""Beginnings of texts that were read before: which there are, and which to forget first.

A hybrid model can go on from a length only where both its keys and values and its recurrent states
are kept: an entry is pages and a snapshot, found by a chain of hashes over whole blocks of tokens
and by the tokens after the last whole block. On the host and free of jax.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

_ROOT = b""  # the hash of no block

Place = tuple[bytes, tuple[int, ...]]  # the hash of a text's whole blocks, and the tokens after


@dataclasses.dataclass(eq=False)
class Entry:
    """The beginning of some row, kept: its pages, of which it is a holder, and a snapshot."""

    length: int  # tokens
    pages: tuple[int, ...]  # the last one may be filled in part
    snapshot: int
    complete: bool  # with a hidden state, from which the next token can be drawn
    users: int = 1  # samples that wait to start from it, as one, and the prefix cache


def block_hashes(tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """A hash for each number of whole blocks from 0: of all tokens in them."""
    data, hashes = np.asarray(tokens, np.int32).tobytes(), [_ROOT]
    size = 4 * block_tokens
    for start in range(0, len(data) - size + 1, size):
        block = data[start : start + size]
        hashes.append(hashlib.blake2b(hashes[-1] + block, digest_size=16).digest())
    return hashes


class PrefixCache:
    """Entries by their tokens, and in the order of their last use."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.queries = self.hits = self.hit_tokens = 0
        # By hash of whole blocks, then by the tokens after them.
        self._found: dict[bytes, dict[tuple[int, ...], Entry]] = {}
        self._places: collections.OrderedDict[Entry, Place]
        self._places = collections.OrderedDict()

    def emptied(self) -> "PrefixCache":
        """Another one without entries, whose counts go on."""
        new = PrefixCache(self.block_tokens)
        new.queries, new.hits, new.hit_tokens = self.queries, self.hits, self.hit_tokens
        return new

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._places)

    def find(self, tokens: Sequence[int], hashes: Sequence[bytes]) -> Entry | None:
        """The longest entry that the tokens begin with and that can serve them; it becomes the
        newest.

        `hashes` are the tokens' own. All tokens but the last must do where an entry has no hidden
        state to draw the next one from.
        """
        for blocks in range(len(hashes) - 1, -1, -1):
            here = self._found.get(hashes[blocks], {})
            rest = tuple(tokens[blocks * self.block_tokens :])
            fitting = [
                entry
                for tail, entry in here.items()
                if rest[: len(tail)] == tail and (entry.complete or entry.length < len(tokens))
            ]
            if fitting:
                found = max(fitting, key=lambda entry: entry.length)
                self._places.move_to_end(found)
                return found
        return None

    def count(self, entry: Entry | None) -> None:
        """Count that a request started, and what from."""
        self.queries += 1
        if entry in self._places:
            self.hits += 1
            self.hit_tokens += entry.length

    def place(self, tokens: Sequence[int], length: int, hashes: Sequence[bytes]) -> Place:
        """Where an entry of the first `length` tokens belongs; `hashes` are of all tokens."""
        blocks = length // self.block_tokens
        return hashes[blocks], tuple(tokens[blocks * self.block_tokens : length])

    def holds(self, place: Place) -> bool:
        """Whether there is an entry; it becomes the newest."""
        entry = self._found.get(place[0], {}).get(place[1])
        if entry is not None:
            self._places.move_to_end(entry)
        return entry is not None

    def add(self, place: Place, entry: Entry) -> None:
        """Remember an entry in a place that has none."""
        self._found.setdefault(place[0], {})[place[1]] = entry
        self._places[entry] = place

    def pop_oldest(self) -> Entry | None:
        """The entry that was used longest ago, which is forgotten; None where there is none."""
        if not self._places:
            return None
        entry, (digest, tail) = self._places.popitem(last=False)
        del self._found[digest][tail]
        if not self._found[digest]:
            del self._found[digest]
        return entry
