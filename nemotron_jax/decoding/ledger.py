"""What requests were given, written so that an exception at any moment loses nothing and gives
nothing twice. All else that an engine holds can be made again from it."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from nemotron_jax.decoding.scheduler import Job
from nemotron_jax.decoding.speculative import Acceptance


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a request is given at once, after the tokens that it has: applied twice, it is the
    same."""

    job: Job
    before: int  # tokens that the request has
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    version: int | str = 0
    reason: str | None = None  # why the request is over; None while it goes on

    def apply(self) -> None:
        """Give it."""
        request = self.job.request
        request.tokens[self.before :] = self.tokens
        request.logprobs[self.before :] = self.logprobs
        request.versions[self.before :] = [self.version] * len(self.tokens)
        request.finish_reason = self.reason


@dataclasses.dataclass(frozen=True)
class Totals:
    """What all requests were given so far."""

    places: Int[np.ndarray, "places"]  # new tokens by `speculative.place_of`
    new_tokens: int = 0
    finished: int = 0
    cancelled: int = 0

    def after(self, gains: Sequence[Gain], places: Int[np.ndarray, "places"] | int) -> "Totals":
        """With what some gains add."""
        reasons = [gain.reason for gain in gains if gain.reason is not None]
        cancelled = reasons.count("cancelled")
        return Totals(
            places=self.places + places,
            new_tokens=self.new_tokens + sum(len(gain.tokens) for gain in gains),
            finished=self.finished + len(reasons) - cancelled,
            cancelled=self.cancelled + cancelled,
        )


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done and what it holds."""

    running: int
    waiting: int
    finished: int  # cancelled ones not counted
    cancelled: int
    new_tokens: int
    prompt_tokens: int  # that were read; those of shared prompts once
    pages: int
    free_pages: int
    free_snapshots: int
    programs: int  # compiled so far; stays as it is after the engine was made
    version: int | str
    acceptance: Acceptance | None  # of drafted tokens; None without speculation
    prefix_entries: int = 0
    prefix_queries: int = 0  # requests that started
    prefix_hits: int = 0  # those of them that started from an entry
    prefix_tokens: int = 0  # prompt tokens that were not read again


class Ledger:
    """Requests that are not over, in the order in which they came, and the totals of all."""

    def __init__(self, places: int) -> None:
        self.totals = Totals(np.zeros(places, np.int64))
        self._jobs: dict[Job, None] = {}
        self._pending: tuple[Sequence[Gain], Totals] | None = None

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def enter(self, jobs: Sequence[Job]) -> None:
        """New requests, all of them or none."""
        self._jobs |= dict.fromkeys(jobs)

    def replace(self, jobs: Sequence[Job]) -> None:
        """The same requests as other jobs."""
        self._jobs = dict.fromkeys(jobs)

    def give(self, gains: Sequence[Gain], places: Int[np.ndarray, "places"] | int = 0) -> None:
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
