"""Conversations through the serving engine: slots and pages, shared prompts, known beginnings."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.sampler import Sampler, SideBySide, Written
from nemotron_jax.sharding import make_mesh

_PAGE_TOKENS = 16  # beginnings are known by whole pages: episodes of small models are short


def make_sampler(config: RolloutConfig) -> Sampler:
    """The sampler that a config names."""
    return EngineSampler(config.slots) if config.sampler == "engine" else SideBySide


class EngineSampler:
    """One engine for all batches of a run, on the first device; it is made at the first call."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._engine: Engine | None = None
        self._model: Nemotron | None = None  # whose weights the engine has
        self._version = 0

    def __call__(
        self,
        model: Nemotron,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        max_tokens: int,
        stop_token: int,
        temperature: float,
        seed: int,
    ) -> "EngineConversations":
        """`copies` conversations of each prompt, next to each other; a prompt is read once."""
        self.swap(model, max_tokens)
        wanted = {"stop_tokens": (stop_token,), "temperature": temperature}
        return EngineConversations(self, prompts, copies, max_tokens, seed, wanted)

    def swap(self, model: Nemotron, max_tokens: int) -> None:
        """Let the engine go on with these weights; what it knows of the same ones it keeps."""
        if model is self._model:
            return
        self._model = model
        self._version += 1
        with jax.set_mesh(self._mesh):
            model = jax.device_put(model, jax.devices()[0])
            if self._engine is not None:
                self._engine.replace_weights(model, self._version)
                return
            config = EngineConfig(
                slots=self._slots,
                max_length=max_tokens,
                page_tokens=_PAGE_TOKENS,
                prefix_cache=True,
                snapshots=4 * self._slots,
            )
            self._engine = Engine(model, config, version=self._version)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return make_mesh(MeshConfig(), jax.devices()[:1])

    def submit(self, prompt: Sequence[int], *, n: int = 1, **wanted: object) -> list[Request]:
        """Requests to continue a prompt."""
        with jax.set_mesh(self._mesh):
            return self._engine.submit(prompt, Wanted(**wanted), n=n)

    def run(self) -> None:
        """Serve every request."""
        with jax.set_mesh(self._mesh):
            self._engine.run()


class EngineConversations:
    """Conversations of an engine. A turn is a request whose prompt is the conversation so far."""

    def __init__(
        self,
        sampler: EngineSampler,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_tokens: int,
        seed: int,
        wanted: dict,
    ) -> None:
        self._sampler, self._copies, self._max_tokens = sampler, copies, max_tokens
        self._wanted = wanted
        self._rows = [list(prompt) for prompt in prompts for _ in range(copies)]
        # Draws are by seed and place in the text; each row has a seed of its own.
        seeds = np.random.SeedSequence(seed).generate_state(len(self._rows) + len(prompts))
        self._seeds = [int(one) >> 1 for one in seeds]
        self._fresh = True

    def swap(self, model: Nemotron) -> None:
        """Go on with a model; other weights read the conversations so far anew."""
        self._sampler.swap(model, self._max_tokens)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Feed each conversation its tokens, possibly none; the engine reads them as it goes on."""
        for row, new in zip(self._rows, rows, strict=True):
            row.extend(new)
        self._fresh &= not any(rows)

    def write(self, limits: Sequence[int]) -> list[Written]:
        """Go on with each conversation by at most so many tokens, up to its stop token."""
        requests: dict[int, Request] = {}
        if self._fresh and min(limits) == max(limits):
            for first in range(0, len(self._rows), self._copies):
                seed = self._seeds[len(self._rows) + first // self._copies]
                options = {"n": self._copies, "seed": seed, "max_new_tokens": limits[0]}
                found = self._sampler.submit(self._rows[first], **options, **self._wanted)
                requests |= {first + n: request for n, request in enumerate(found)}
        else:
            for place, limit in enumerate(limits):
                if limit:
                    options = {"seed": self._seeds[place], "max_new_tokens": limit}
                    found = self._sampler.submit(self._rows[place], **options, **self._wanted)
                    requests[place] = found[0]
        self._fresh = False
        self._sampler.run()
        out = [Written((), (), False)] * len(self._rows)
        for place, request in requests.items():
            stopped = request.finish_reason == "stop"
            out[place] = Written(tuple(request.tokens), tuple(request.logprobs), stopped)
            self._rows[place] += request.tokens
        return out
