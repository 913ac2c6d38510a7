"""Conversations of a model, through whatever generator: fed what they read, they write turns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.generator import Generator
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import make_mesh

_PAGE_TOKENS = 16  # beginnings are known by whole pages: episodes of small models are short
_SNAPSHOTS = 4  # beginnings that are kept for each slot: those of its conversation's last turns


@dataclasses.dataclass(frozen=True)
class Written:
    """New tokens of one conversation, with the generator's log-probability of each: that of the
    distribution it was drawn from, temperature included."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool  # by a stop token, which is the last
    forced: tuple[bool, ...] = ()  # whether the budget put it there; () is none of them


class Conversations(Protocol):
    """Conversations next to each other, each at the end of what it has read and written."""

    def swap(self, model: Nemotron) -> None:
        """Go on with a model."""
        ...

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Feed each conversation its tokens, possibly none."""
        ...

    def write(self, limits: Sequence[int]) -> list[Written]:
        """Go on with each conversation by at most so many tokens, up to its stop token."""
        ...


class Sampler(Protocol):
    """How a model is asked to go on with conversations."""

    def __call__(
        self,
        model: Nemotron,
        prompts: Sequence[Sequence[int]],
        copies: int,
        wanted: Wanted,
        execution: Execution,
    ) -> Conversations:
        """`copies` conversations of each prompt, next to each other. `wanted` says how turns are
        written; the length of each is said when it is, and its seed is that of all draws."""
        ...


class SideBySide:
    """Every set of conversations in one batch of its own, on all devices of the mesh."""

    def __init__(self, max_tokens: int, speculative: int = 0) -> None:
        """`max_tokens` bounds a conversation; `speculative` tokens at a time are drafted."""
        self._max_tokens, self._speculative = max_tokens, speculative

    def __call__(
        self,
        model: Nemotron,
        prompts: Sequence[Sequence[int]],
        copies: int,
        wanted: Wanted,
        execution: Execution = Execution(),
    ) -> "GeneratedConversations":
        """Conversations whose memory is free when they are dropped."""
        policy = Policy(self._make)
        policy.swap(model, execution)
        return GeneratedConversations(policy, prompts, copies, wanted, execution)

    def _make(self, model: Nemotron, execution: Execution) -> Generator:
        return Lockstep(
            model, execution, speculative=self._speculative, max_length=self._max_tokens
        )


class OnSlots:
    """One engine for all sets of conversations, on the first device; made at the first call."""

    def __init__(self, slots: int, max_tokens: int, speculative: int = 0) -> None:
        self._config = EngineConfig(
            slots=slots,
            max_length=max_tokens,
            page_tokens=_PAGE_TOKENS,
            prefix_cache=True,
            snapshots=_SNAPSHOTS * slots,
            speculative=speculative,
        )
        self._policy = Policy(self._make)

    def __call__(
        self,
        model: Nemotron,
        prompts: Sequence[Sequence[int]],
        copies: int,
        wanted: Wanted,
        execution: Execution = Execution(),
    ) -> "GeneratedConversations":
        """Conversations that share what the engine has read with the same weights."""
        self._policy.swap(model, execution)
        return GeneratedConversations(self._policy, prompts, copies, wanted, execution)

    def _make(self, model: Nemotron, execution: Execution) -> Generator:
        first = jax.devices()[0]
        with jax.set_mesh(make_mesh(MeshConfig(), [first])):  # the engine stays on it
            return Engine(jax.device_put(model, first), self._config, execution)


def make_sampler(config: RolloutConfig) -> Sampler:
    """The sampler that a config names."""
    if config.sampler == "engine":
        return OnSlots(config.slots, config.max_tokens, config.speculative)
    return SideBySide(config.max_tokens, config.speculative)


class Policy:
    """A generator, and the model whose weights it has."""

    def __init__(self, make: Callable[[Nemotron, Execution], Generator]) -> None:
        """`make` is called with the first model, and with one that runs otherwise."""
        self._make = make
        self._execution: Execution | None = None
        self._model: Nemotron | None = None
        self._version = 0
        self.generator: Generator | None = None

    def swap(self, model: Nemotron, execution: Execution) -> None:
        """Let it go on with these weights; what it has read with the same ones it keeps."""
        if model is self._model and execution == self._execution:
            return
        self._version += 1
        if self.generator is None or execution != self._execution:
            self.generator = None  # frees the old one first
            self.generator = self._make(model, execution)
        else:
            self.generator.replace_weights(model, self._version)
        self._model, self._execution = model, execution


class GeneratedConversations:
    """Conversations of a generator. A turn is a request whose prompt is the conversation so far."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        copies: int,
        wanted: Wanted,
        execution: Execution,
    ) -> None:
        self._policy, self._copies, self._wanted = policy, copies, wanted
        self._execution = execution
        self._rows = [list(prompt) for prompt in prompts for _ in range(copies)]
        # Draws are by seed, branch and place in the text. The first turns of a prompt are branches
        # of one seed, as in `generate([prompt] * copies)`; later ones have a seed for each row.
        count = len(self._rows) + len(prompts)
        seeds = np.random.SeedSequence(wanted.seed).generate_state(count)
        self._row_seeds = [int(one) >> 1 for one in seeds[: len(self._rows)]]
        self._prompt_seeds = [int(one) >> 1 for one in seeds[len(self._rows) :]]
        self._fresh = True

    def swap(self, model: Nemotron) -> None:
        """Go on with a model; other weights read the conversations so far anew."""
        self._policy.swap(model, self._execution)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Take each conversation's tokens, possibly none; they are read when it goes on."""
        for row, new in zip(self._rows, rows, strict=True):
            row.extend(new)
        self._fresh &= not any(rows)

    def write(self, limits: Sequence[int]) -> list[Written]:
        """Go on with each conversation by at most so many tokens, up to its stop token."""
        requests: dict[int, Request] = {}
        for group, first in enumerate(range(0, len(self._rows), self._copies)):
            rows = range(first, first + self._copies)
            asked = {limits[row] for row in rows}
            if self._fresh and len(asked) == 1 and asked != {0}:
                seed = self._prompt_seeds[group]
                requests |= zip(rows, self._submit(first, asked.pop(), seed, self._copies))
            else:
                for row in rows:
                    if limits[row]:
                        requests[row] = self._submit(row, limits[row], self._row_seeds[row])[0]
        self._fresh = False
        self._policy.generator.run()
        out = [Written((), (), False)] * len(self._rows)
        for row, request in requests.items():
            stopped = request.finish_reason == "stop"
            new = tuple(request.tokens), tuple(request.logprobs), stopped, tuple(request.forced)
            out[row] = Written(*new)
            self._rows[row] += request.tokens
        return out

    def _submit(self, row: int, limit: int, seed: int, n: int = 1) -> list[Request]:
        wanted = dataclasses.replace(self._wanted, max_new_tokens=limit, seed=seed)
        return self._policy.generator.submit(self._rows[row], wanted, n=n)
