"""What requests were given, written so that an exception at any moment loses nothing and gives
nothing twice. All else that an engine holds can be made again from it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from nemotron_jax.decoding.scheduler import Job

if TYPE_CHECKING:
    from nemotron_jax.decoding.store import Decoded


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a request is given at once, after the tokens that it has: applied twice, it is the
    same."""

    job: Job
    before: int  # tokens that the request has
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    forced: Sequence[bool] = ()
    top_logprobs: Sequence[tuple[tuple[int, float], ...]] = ()
    places: Sequence[int] = ()
    version: int | str = 0
    reason: str | None = None  # why the request is over; None while it goes on

    @classmethod
    def of(cls, job: Job, decoded: "Decoded", row: int, version: int | str) -> "Gain":
        """What a row of a decode call, on the host, is to its request, which may end with it."""
        request, given = job.request, decoded.given
        count = int(decoded.count[row])
        tokens, reason = given.tokens[row, :count].tolist(), None
        if decoded.done[row]:
            reason = "stop" if tokens[-1] in request.wanted.stop_tokens else "length"
        if job.stop_text is not None:
            place = next((n for n, t in enumerate(tokens) if job.stop_text.push(t)), None)
            if place is not None:
                count, reason = place + 1, "stop"
        wanted, top = request.wanted.top_logprobs, ()
        if wanted:
            ids, values = given.top_tokens[row, :count, :wanted], given.top_logprobs[row]
            pairs = zip(ids.tolist(), values[:count, :wanted].tolist(), strict=True)
            top = [tuple(zip(*pair, strict=True)) for pair in pairs]
        return cls(
            job,
            before=len(request.tokens),
            tokens=tokens[:count],
            logprobs=given.logprobs[row, :count].tolist(),
            forced=given.forced[row, :count].tolist(),
            top_logprobs=top,
            places=given.places[row, :count].tolist(),
            version=version,
            reason=reason,
        )

    def apply(self) -> None:
        """Give it."""
        request = self.job.request
        request.tokens[self.before :] = self.tokens
        request.logprobs[self.before :] = self.logprobs
        request.forced[self.before :] = self.forced
        request.places[self.before :] = self.places
        request.versions[self.before :] = [self.version] * len(self.tokens)
        if request.wanted.top_logprobs:
            request.top_logprobs[self.before :] = self.top_logprobs
        request.finish_reason = self.reason


@dataclasses.dataclass(frozen=True)
class Totals:
    """What all requests were given so far."""

    places: Int[np.ndarray, "k+1 places"]  # new tokens by `speculative.count_places`
    new_tokens: int = 0
    finished: int = 0
    cancelled: int = 0

    def after(self, gains: Sequence[Gain], places: Int[np.ndarray, "k+1 places"] | int) -> "Totals":
        """With what some gains add."""
        reasons = [gain.reason for gain in gains if gain.reason is not None]
        cancelled = reasons.count("cancelled")
        return Totals(
            places=self.places + places,
            new_tokens=self.new_tokens + sum(len(gain.tokens) for gain in gains),
            finished=self.finished + len(reasons) - cancelled,
            cancelled=self.cancelled + cancelled,
        )


class Ledger:
    """Requests that are not over, in the order in which they came, and the totals of all."""

    def __init__(self, most_drafts: int) -> None:
        self.totals = Totals(np.zeros((most_drafts + 1, 2 * (most_drafts + 1)), np.int64))
        self._jobs: dict[Job, None] = {}
        self._pending: tuple[Sequence[Gain], Totals] | None = None

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def enter(self, jobs: Sequence[Job]) -> None:
        """New requests, all of them or none."""
        self._jobs |= dict.fromkeys(jobs)

    def replace(self, jobs: Sequence[Job]) -> None:
        """The requests that are not over, as new jobs: all that `enter` gave stays in order."""
        self._jobs = dict.fromkeys(jobs)

    def give(self, gains: Sequence[Gain], places: Int[np.ndarray, "k+1 places"] | int = 0) -> None:
        """Give all of it: whatever happens, `settle` ends what this began."""
        self._pending = gains, self.totals.after(gains, places)  # one store: from here it is given
        self.settle()

    def settle(self) -> None:
        """End what an interrupted `give` began."""
        if self._pending is None:
            return
        gains, self.totals = self._pending
        for gain in gains:
            gain.apply()
        for gain in gains:
            if gain.reason is not None:
                self._jobs.pop(gain.job, None)
        self._pending = None
