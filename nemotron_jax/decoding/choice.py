"""How many tokens to draft a round: what drafts cost and how often they stand decides.

A round of k drafts costs k drafts and one verification, and gives as many tokens as stand and one
more. Costs are in plain rounds of as many rows. Plain Python: the device is asked by others.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

# Another k must promise so much more than the one in use: figures of a loaded machine move by a few
# per cent from one minute to the next, and a change of k has a price of its own.
MARGIN = 0.05
# Chance that a draft stands where those before it did, until some were tried; published for Super
# (7 drafts, 3.45 tokens a round: SPEED-Bench, arXiv:2604.12374). It weighs as much as _TRIED tries.
STANDS, _TRIED = 0.74, 16.0
_WINDOW = 256.0  # verifications after which what was seen weighs 1/e
# Calls between two that draft more than the choice, so that it is noticed when drafts get better.
_PROBE_CALLS = 32


def mean_length(by_position: Sequence[float], k: int) -> float:
    """Tokens that a verification of k drafts gives, of the shares of drafts that stand at each
    place; behind the last place known each stands as often as the one before let it."""
    shares = [1.0, *by_position[:k]]
    last = shares[-1] / shares[-2] if len(shares) > 1 and shares[-2] else STANDS
    while len(shares) <= k:
        shares.append(shares[-1] * last)
    return sum(shares)


def choose_k(
    draft_cost: float,
    verify_cost: Mapping[int, float],
    by_position: Sequence[float],
    *,
    now: int = 0,
) -> int:
    """The number of drafts a round that gives most tokens for its time, 0 where none pays.

    `draft_cost` is a draft's time and `verify_cost[k]` that of a verification of k drafts and the
    token before them, both over a plain round's; `by_position` are the shares of all drafts at each
    place that stand. A k whose mean length is at most k · draft_cost + verify_cost[k] is never
    chosen. `now` is kept unless another k promises `MARGIN` more.
    """
    worth = {0: 1.0}
    for k, verification in verify_cost.items():
        cost = k * draft_cost + verification
        length = mean_length(by_position, k)
        if length > cost:  # false of NaN too
            worth[k] = length / cost if cost > 0 else math.inf
    best = max(worth, key=worth.get)
    return best if worth[best] > (1 + MARGIN) * worth.get(now, 0.0) else now


@dataclasses.dataclass(frozen=True)
class Costs:
    """In plain rounds of as many rows: of a draft, and of a verification by its drafts."""

    draft: float
    verify: Mapping[int, float]


class Drafts:
    """Chooses the drafts of each decode call, and learns from what became of them.

    `costs` are those of each number of rows that a call may have; without any, the one choice that
    there is stays.
    """

    def __init__(self, choices: Sequence[int], costs: Mapping[int, Costs] | None = None) -> None:
        self._choices, self._costs = tuple(choices), costs or {}
        self._chosen = {rows: min(choices) for rows in self._costs}
        self._rows = max(self._costs, default=0)
        most = max(choices)
        # By place: drafts that all before them let be tried, and those of them that stood.
        self._tried = np.full(most, _TRIED)
        self._stood = self._tried * STANDS
        self._calls = 0
        for rows in self._costs:
            self._choose(rows)

    @property
    def k(self) -> int:
        """Drafts a round, as chosen for the rows of the last call."""
        return self._chosen.get(self._rows, self._choices[0])

    @property
    def draft_cost(self) -> float | None:
        """Of one draft, in plain rounds; None where nothing is chosen."""
        return self._costs[self._rows].draft if self._costs else None

    @property
    def verify_cost(self) -> float | None:
        """Of a verification of the drafts in use, or of the fewest where none are."""
        if not self._costs:
            return None
        verify = self._costs[self._rows].verify
        return verify[self.k or min(verify)]

    @property
    def by_position(self) -> list[float]:
        """Shares of all drafts at each place that stand, as far as they are known."""
        return np.cumprod(self._stood / self._tried).tolist()

    def next(self, rows: int) -> int:
        """Drafts of the next call, which has so many rows."""
        if not self._costs:
            return self._choices[0]
        self._rows = rows
        self._choose(rows)
        self._calls += 1
        if self._calls % _PROBE_CALLS:
            return self.k
        return self._more(rows)

    def learn(self, k: int, places: Int[np.ndarray, "places"]) -> None:
        """What became of a call's rounds of k drafts: how many tokens were given at each place."""
        if not self._costs or not k:
            return
        counts = np.concatenate([[places[0] + places[1]], places[1 : 2 * k : 2]]).astype(float)
        keeps = math.exp(-counts[0] / _WINDOW)
        self._tried[:k] = keeps * self._tried[:k] + counts[:-1]
        self._stood[:k] = keeps * self._stood[:k] + counts[1:]

    def _choose(self, rows: int) -> None:
        costs, now = self._costs[rows], self._chosen[rows]
        self._chosen[rows] = choose_k(costs.draft, costs.verify, self.by_position, now=now)

    def _more(self, rows: int) -> int:
        """What to try beside the choice: the next larger one, or from none the one that loses
        least."""
        costs, now = self._costs[rows], self._chosen[rows]
        if now:
            return next((k for k in self._choices if k > now), now)
        price = lambda k: k * costs.draft + costs.verify[k]
        return max(costs.verify, key=lambda k: mean_length(self.by_position, k) / price(k))


def fastest(seconds: Iterable[tuple[object, float]]) -> dict:
    """The shortest time of each of some things that were timed in turn."""
    found: dict = {}
    for name, time in seconds:
        found[name] = min(time, found.get(name, math.inf))
    return found


def costs_of(seconds: Mapping[int, float], draft_seconds: float) -> Costs:
    """Costs from the times of a round by its drafts, 0 among them, and the time of one draft."""
    plain = seconds[0]
    verify = {k: max(time - k * draft_seconds, 0.0) / plain for k, time in seconds.items() if k}
    return Costs(draft_seconds / plain, verify)
