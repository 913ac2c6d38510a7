"""Random draws that are the same in every process and in every version of Python."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Draws named by the strings and integers they are seeded with.

    Only `getrandbits` of the Mersenne Twister is used: Python keeps its sequence fixed, whereas
    `randrange`, `shuffle` and `sample` have changed between versions.
    """

    def __init__(self, *seed: str | int | None) -> None:
        digest = hashlib.sha256(json.dumps(seed).encode()).digest()
        self._bits = random.Random(int.from_bytes(digest, "big")).getrandbits

    def below(self, count: int) -> int:
        """An integer of 0 … count - 1, each as likely."""
        if count < 1:
            raise ValueError(f"Draws.below: count={count} leaves nothing to draw; give at least 1")
        width = (count - 1).bit_length()
        while (number := self._bits(width) if width else 0) >= count:
            pass
        return number

    def between(self, low: int, high: int) -> int:
        """An integer of low … high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, parts: int, of: int) -> bool:
        """True `parts` times in `of`."""
        return self.below(of) < parts

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A copy of the items in an order of their own."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` items at different places, in random order."""
        if count > len(items):
            raise ValueError(f"Draws.sample: {count} of {len(items)} items cannot be drawn")
        moved: dict[int, int] = {}  # a shuffle's first steps, of which only the changes are kept
        drawn = []
        for place in range(count):
            other = place + self.below(len(items) - place)
            drawn.append(items[moved.get(other, other)])
            moved[other] = moved.get(place, place)
        return drawn
