"""What everyone who goes on with a text knows: requests in, tokens out, whoever decodes them."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.speculative import Acceptance
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.nemotron import Nemotron


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a generator has done and what it holds."""

    running: int
    waiting: int
    finished: int  # cancelled ones not counted
    cancelled: int
    new_tokens: int
    prompt_tokens: int  # that were read; those of shared prompts once
    version: int | str  # of the weights
    acceptance: Acceptance | None  # of drafted tokens; None without speculation
    speculative: int = 0  # drafts a round, as chosen now
    # In plain rounds, of a draft and of a verification of those drafts; None where k is given.
    draft_cost: float | None = None
    verify_cost: float | None = None
    # Of an engine alone:
    programs: int = 0  # compiled so far; stays as it is after the engine was made
    pages: int = 0
    free_pages: int = 0
    free_snapshots: int = 0
    prefix_entries: int = 0
    prefix_queries: int = 0  # requests that started
    prefix_hits: int = 0  # those of them that started from an entry
    prefix_tokens: int = 0  # prompt tokens that were not read again


class Generator(Protocol):
    """Continues prompts. `Engine` lets requests come and go; `Lockstep` takes them together."""

    def submit(self, prompt: Sequence[int], wanted: Wanted, *, n: int = 1) -> list[Request]:
        """n requests to continue a prompt; sample i draws with the seed and its own number."""
        ...

    def step(self) -> bool:
        """Do some of the work; whether there is more."""
        ...

    def run(self) -> None:
        """Step until every request is over."""
        ...

    def replace_weights(self, model: Nemotron, version: int | str) -> None:
        """Go on with another model's parameters; tokens from now on bear `version`."""
        ...

    def stats(self) -> Stats:
        """Counts since it was made, and what it holds now."""
        ...
