"""Which source each row of the run comes from, as a function of the row's number alone."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

LONGEST_PERIOD = 1 << 16


class Place(NamedTuple):
    """A row of the run as a row of one source: how many rows that source gave before."""

    source: int
    row: int


class Mixture:
    """Rows dealt to sources in proportion to weights, in a fixed period.

    After any number n of rows, each source has given within one row of n times its share. Weights
    are read as decimal fractions; `shares` are the ones in force: exact when the weights repeat
    within LONGEST_PERIOD rows, otherwise within one part of LONGEST_PERIOD.

    Source of the rule: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32
    (1980); its bound is 1 - 1/(2k - 2) rows for k sources.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = _parts(weights)
        self.period = sum(parts)
        self.shares = tuple(part / self.period for part in parts)
        self._source_of = _deal(parts)
        dealt = np.zeros((self.period + 1, len(parts)), np.int64)
        dealt[1:] = np.cumsum(np.eye(len(parts), dtype=np.int64)[self._source_of], axis=0)
        self._dealt = dealt

    def place(self, row: int) -> Place:
        """The source of global row `row`, and the number of rows that source gave before it."""
        periods, rest = divmod(row, self.period)
        source = int(self._source_of[rest])
        return Place(source, int(periods * self._dealt[-1, source] + self._dealt[rest, source]))

    def counters(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source gave."""
        periods, rest = divmod(rows, self.period)
        return [int(count) for count in periods * self._dealt[-1] + self._dealt[rest]]


def _parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the weights' proportion, with a sum of at most LONGEST_PERIOD."""
    if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"Mixture: weights={list(weights)} must all be positive and finite")
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    borders = [round(share * LONGEST_PERIOD) for share in itertools.accumulate(shares)]
    parts = [end - begin for begin, end in itertools.pairwise([0, *borders])]
    if min(parts) == 0:
        raise ValueError(
            f"Mixture: weights={list(weights)} give source {parts.index(0)} less than one of "
            f"{LONGEST_PERIOD} rows; raise its weight or leave it out"
        )
    return parts


def _deal(parts: Sequence[int]) -> Int[np.ndarray, "period"]:
    """The source of each row of one period.

    A source may give the next row once it lags its share by 1/(2k-2) rows; of those the one whose
    deadline comes first gives it. All in whole numbers of 1/(period (2k-2)) rows.
    """
    period, spread = sum(parts), 2 * len(parts) - 2
    if len(parts) == 1:
        return np.zeros(period, np.int64)
    given = [0] * len(parts)
    sources = np.zeros(period, np.int64)
    for row in range(period):
        lags = [
            spread * (part * (row + 1) - period * count)
            for part, count in zip(parts, given, strict=True)
        ]
        chosen = min(
            (source for source, lag in enumerate(lags) if lag >= period),
            key=lambda source: Fraction(period * (spread - 1) - lags[source], parts[source]),
        )
        given[chosen] += 1
        sources[row] = chosen
    return sources
