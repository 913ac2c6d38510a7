"""A small model behind a server, and what it gives for a request alone."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

import nemotron_jax as nj
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.parameters import abstract_model
from nemotron_jax.serving.grammars import TextGrammar
from tests.decoding.test_speculative import MARGIN, agreeing
from tests.serving.live import TOKENIZER
from tests.tiny_models import randomised, tiny_config

LENGTH, PAGE, DRAFTS = 1280, 16, 2  # the description of a tool takes 900 tokens
TRIES = 30  # each brings one pair in four that is so near to change places
ROWS = 64  # of a batch of references: one program serves them all


@functools.cache
def model() -> nj.Nemotron:
    """Random weights, whose drafts are often right."""
    config = dataclasses.replace(tiny_config("M*E", "*E"), vocab_size=TOKENIZER.vocab_size)
    return for_decoding(agreeing(randomised(abstract_model(config), 0)))


@dataclasses.dataclass
class Asked:
    """What an engine was asked, with a grammar that has heard nothing, and what it made of it."""

    prompt: tuple[int, ...]
    wanted: Wanted
    requests: list[Request]


class Noting(Engine):
    """An engine that keeps what it was asked."""

    asked: list[Asked]

    def submit(self, prompt: Sequence[int], wanted: Wanted, *, n: int = 1) -> list[Request]:
        """As the engine's."""
        fresh = dataclasses.replace(wanted, grammar=copy_of(wanted.grammar))
        requests = super().submit(prompt, wanted, n=n)
        self.asked.append(Asked(tuple(prompt), fresh, requests))
        return requests


def copy_of(grammar: TextGrammar | None) -> TextGrammar | None:
    """A grammar that goes on from where another stands."""
    if grammar is None:
        return None
    matcher = grammar._matcher.deep_copy()
    return TextGrammar(matcher, grammar._tokens, opening=grammar._opening, call=grammar._call)


def make_engine(**sizes: object) -> Noting:
    """An engine with drafts, pages and a prefix cache."""
    common = {"slots": 8, "max_length": LENGTH, "page_tokens": PAGE, "rounds": 4, "snapshots": 16}
    common |= {"prefix_cache": True, "speculative": DRAFTS, "prefill_shapes": ((4, 32), (1, 128))}
    engine = Noting(model(), EngineConfig(**{**common, **sizes}), tokenizer=TOKENIZER)
    engine.asked = []
    return engine


def differing(asked: Sequence[Asked]) -> list[tuple[Asked, int]]:
    """Those, each with its sample's number, whose tokens are not those of `generate` for it alone.

    They are first generated in batches. What a batch's rounding, which is another, makes different
    is generated alone again.
    """
    each = [(one, n) for one in asked for n in range(len(one.requests))]
    batch = Lockstep(model(), tokenizer=TOKENIZER, speculative=DRAFTS, max_length=LENGTH)
    found = []
    for start in range(0, len(each), ROWS):
        some = each[start : start + ROWS]
        references = [_begun(batch, one, branch) for one, branch in some]
        for _ in range(ROWS - len(some)):
            batch.enter([Request((1,), Wanted(1), 0, batch.step)])
        batch.run()
        found += [pair for pair, own in zip(some, references, strict=True) if not _same(pair, own)]
    return [pair for pair in found if not _same(pair, alone(*pair))]


def is_near_tie(one: Asked, branch: int) -> bool:
    """Whether a change of the logits within rounding makes `generate`'s tokens the ones that were
    served: then neither are wrong."""
    own = one.requests[branch].tokens
    for seed in range(TRIES):
        draw = np.random.default_rng(seed)
        noise = draw.uniform(-MARGIN / 2, MARGIN / 2, TOKENIZER.vocab_size)
        bias = dict(enumerate(noise.tolist()))
        for token, value in one.wanted.logit_bias.items():
            bias[token] += value
        wanted = dataclasses.replace(one.wanted, logit_bias=bias)
        if alone(dataclasses.replace(one, wanted=wanted), branch).tokens[: len(own)] == own:
            return True
    return False


def _begun(generator: Lockstep, one: Asked, branch: int) -> Request:
    wanted = dataclasses.replace(one.wanted, grammar=copy_of(one.wanted.grammar))
    request = Request(one.prompt, wanted, branch, generator.step)
    generator.enter([request])
    return request


def alone(one: Asked, branch: int = 0) -> Request:
    """What `generate` gives."""
    generator = Lockstep(model(), tokenizer=TOKENIZER, speculative=DRAFTS)
    if not branch:
        return _begun(generator, one, 0).wait()
    rows = [_begun(generator, one, n) for n in range(len(one.requests))]
    generator.run()
    return rows[branch]


def _same(pair: tuple[Asked, int], reference: Request) -> bool:
    own = pair[0].requests[pair[1]]
    if own.finish_reason == "cancelled":
        return own.tokens == reference.tokens[: len(own.tokens)]
    return (own.tokens, own.finish_reason) == (reference.tokens, reference.finish_reason)
