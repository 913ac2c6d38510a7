"""What a suite is given: the model or the server, one generator for all, and where answers go."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.generator import Generator
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.answers import Answer, Answerer, Ask
from nemotron_jax.evaluation.own_model import OwnModel
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Unavailable
from nemotron_jax.evaluation.transcripts import Transcripts
from nemotron_jax.evaluation.url import Url
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.playing.conversations import GeneratedConversations, Policy
from nemotron_jax.sharding import current_mesh

SLOTS = 8  # requests that run side by side: more would compile programs for parts of them too
SNAPSHOTS = 4  # beginnings of prompts that are kept for each slot
_PAGE_TOKENS = 16  # beginnings are known by whole pages: prompts of small models are short


class Shared:
    """What all suites share: the model, its untrained twin, and one generator, made when first
    asked for, which holds the weights of whichever is measured."""

    def __init__(
        self,
        model: Nemotron,
        *,
        longest: int = 0,
        execution: Execution = Execution(),
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> None:
        """`longest`: tokens of the longest request that any suite makes; the tokenizer is for
        texts that end an answer."""
        self.model, self.longest, self.execution = model, longest, execution
        self.tokenizer = tokenizer
        self._seed = seed
        self._twin: Nemotron | None = None
        self.policy = Policy(self._make)

    @property
    def twin(self) -> Nemotron:
        """A model of the same shape that was never trained."""
        if self._twin is None:
            self._twin = untrained_twin(self.model, self._seed)
        return self._twin

    def _make(self, model: Nemotron, execution: Execution) -> Generator:
        assert self.longest, "a suite that makes requests says how long they are: Suite.longest"
        if (mesh := current_mesh()) is not None and mesh.size > 1:
            return Lockstep(model, execution, self.tokenizer, max_length=self.longest)
        sizes = EngineConfig(
            slots=SLOTS,
            max_length=self.longest,
            page_tokens=_PAGE_TOKENS,
            prefix_cache=True,
            snapshots=SNAPSHOTS * SLOTS,
        )
        return Engine(model, sizes, execution, self.tokenizer)


@dataclasses.dataclass
class Context:
    """One suite's view of what is evaluated. `seed` is that of all its draws."""

    subject: Subject
    transcripts: Transcripts
    progress: Progress
    shared: Shared | None = None  # None behind a URL
    is_twin: bool = False
    url: Url | None = None

    @property
    def seed(self) -> int:
        """The seed of every draw that a suite makes."""
        return self.subject.seed

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of what is measured."""
        return self.subject.tokenizer

    @property
    def execution(self) -> Execution:
        """How the model runs."""
        return Execution() if self.shared is None else self.shared.execution

    @property
    def model(self) -> Nemotron:
        """The model that is measured; Unavailable behind a URL."""
        if self.shared is None:
            raise Unavailable("it needs a model in memory; name a directory as --checkpoint")
        return self.shared.twin if self.is_twin else self.shared.model

    @property
    def generator(self) -> Generator:
        """The one of all suites, with this model's weights."""
        policy = self.policy
        policy.swap(self.model, self.execution)
        return policy.generator

    @property
    def policy(self) -> Policy:
        """What plays episodes with that generator."""
        self.model  # noqa: B018  # raises behind a URL
        if self.shared.policy.generator is None:
            self.progress.note(f"compiling for requests of up to {self.shared.longest:,} tokens")
        return self.shared.policy

    def sampler(
        self,
        model: Nemotron,
        prompts: Sequence[Sequence[int]],
        copies: int,
        wanted: Wanted,
        execution: Execution,
    ) -> GeneratedConversations:
        """Conversations that go through that generator: a `playing.conversations.Sampler`."""
        self.policy.swap(model, execution)
        return GeneratedConversations(self.policy, prompts, copies, wanted, execution)

    @property
    def answerer(self) -> Answerer:
        """Who answers requests: this model, or the server."""
        if self.url is not None:
            return self.url
        return OwnModel(
            self.model,
            self.generator,
            self.tokenizer,
            longest=self.shared.longest,
            progress=lambda done, total: self.progress.at(done, total, "answers"),
        )

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each request, in their order."""
        return self.answerer.ask(asks)


def untrained_twin(model: Nemotron, seed: int = 0) -> Nemotron:
    """A model of the same shape, dtypes and layout as training would begin with it; adapters at
    zero. Raises Unavailable for one whose experts are NVFP4 codes."""
    if model.experts_format != "dense":
        raise Unavailable("a model of NVFP4 codes has no untrained twin")
    fresh = flatten(jax.jit(lambda: Nemotron(model.config, rngs=nnx.Rngs(seed)))())
    mine = flatten(model)
    table = {
        name: jax.device_put(fresh[name].astype(leaf.dtype), leaf.sharding)
        if name in fresh
        else jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        for name, leaf in mine.items()
    }
    return unflatten(model, table)
