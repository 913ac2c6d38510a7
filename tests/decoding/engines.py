"""Engines and references that the engine's tests share: always of the same shapes, so that their
programs are compiled once."""

import functools
import inspect
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding import lockstep, reading, store
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.generator import Generator
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.wanted import Wanted
from tests.decoding.test_speculative import agreeing
from tests.tiny_models import quick_jit, random_tokens, randomised, tiny_model

NEW = 24
# No longer than one chunk of `generate`, so that one program serves every reference.
LENGTHS = (16, 1, 9, 13, 7, 2, 8, 15)
PROMPTS = [random_tokens(n, n).tolist() for n in LENGTHS]
GREEDY = {"temperature": 0.0}
WAYS = [GREEDY, *({"temperature": 0.8, "top_p": 0.95, "seed": seed} for seed in (3, 4))]
_OPTIONS = {
    store: {
        "prefill": {"static_argnames": "execution", "donate_argnums": 1},
        "decode": {"static_argnames": ("sizes", "execution"), "donate_argnums": 1},
        "draft_alone": {"static_argnames": ("count", "execution"), "donate_argnums": 1},
        "save_snapshot": {"donate_argnums": 0},
        "load_snapshot": {"donate_argnums": 0},
        "score": {"static_argnames": "execution"},
    },
    reading: {"_read_chunk": {"static_argnames": "execution", "donate_argnums": 1}},
    lockstep: {
        "_decode": {"static_argnames": ("sizes", "execution"), "donate_argnums": 1},
    },
}
_PROGRAMS = {
    (module, name): quick_jit(inspect.unwrap(getattr(module, name)), **options)
    for module, names in _OPTIONS.items()
    for name, options in names.items()
}


@pytest.fixture(scope="module", autouse=True)
def quick_programs() -> Iterator[None]:
    """The programs of engines and references compiled without optimisation."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), program in _PROGRAMS.items():
            patch.setattr(module, name, program)
        yield


@functools.cache
def old_model() -> nj.Nemotron:
    """A model whose drafts are often right."""
    return for_decoding(agreeing(tiny_model("M*E", mtp="*E")))


@functools.cache
def new_model() -> nj.Nemotron:
    """Other weights of the same shapes."""
    return randomised(old_model(), seed=5)


@functools.cache
def alone(
    prompt: int, way: int, speculative: int, version: str = "old"
) -> tuple[list[int], np.ndarray]:
    """The tokens and log-probabilities that `generate` gives for one prompt."""
    model = {"old": old_model, "new": new_model}[version]()
    found = nj.generate(model, [PROMPTS[prompt]], NEW, speculative=speculative, **WAYS[way])
    return found.tokens[0].tolist(), found.logprobs[0]


def make(
    model: nj.Nemotron,
    speculative: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    version: int | str = "old",
    **sizes: object,
) -> Engine:
    """An engine of the common shapes."""
    common = {"slots": 4, "max_length": 40, "page_tokens": 8, "rounds": 3, "snapshots": 4}
    common["pages"] = 14  # two of the longest requests fill ten: some must wait
    common |= {"prefill_shapes": ((2, 8),), "speculative": speculative}
    config = EngineConfig(**{**common, **sizes})
    return Engine(model, config, tokenizer=tokenizer, version=version)


def submit(
    generator: Generator, prompt: Sequence[int], *, n: int = 1, **wanted: object
) -> Request | list[Request]:
    """A request to continue a prompt, or several."""
    found = generator.submit(prompt, Wanted(**wanted), n=n)
    return found if n > 1 else found[0]


@functools.cache
def samples(prompt: int, way: int, speculative: int) -> list[tuple[list[int], np.ndarray]]:
    """The same for four samples of one prompt."""
    rows = [PROMPTS[prompt]] * 4
    found = nj.generate(old_model(), rows, NEW, speculative=speculative, **WAYS[way])
    return [(row.tolist(), logprobs) for row, logprobs in zip(found.tokens, found.logprobs)]


def sample(prompt: int, way: int, speculative: int, branch: int) -> tuple[list[int], np.ndarray]:
    """One of them; the first, and all that are greedy, are as one alone."""
    if not branch or WAYS[way] is GREEDY:
        return alone(prompt, way, speculative)
    return samples(prompt, way, speculative)[branch]


def programs() -> dict[str, int]:
    """How many programs of each name there are."""
    names = ("prefill", "decode", "draft_alone", "score", "save_snapshot", "load_snapshot")
    return {name: getattr(store, name)._cache_size() for name in names}


def assert_alone(request: Request, reference: tuple[list[int], np.ndarray]) -> None:
    """The request's tokens are the first of the reference's."""
    tokens, logprobs = reference
    count = len(request.tokens)
    assert request.tokens == tokens[:count]
    # In float32 other shapes add up in another order; a wrong state moves them by tenths.
    np.testing.assert_allclose(request.logprobs, logprobs[:count], atol=2e-5)


def assert_empty(engine: Engine) -> None:
    """Nothing is left of any request once the prefix cache is emptied."""
    engine._scheduler.check_sums()
    engine._scheduler.expire()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.prefix_entries) == (0, 0, 0)
    assert stats.free_pages == stats.pages and stats.free_snapshots == 4


@quick_jit
def log_probabilities(model: nj.Nemotron, tokens: jax.Array) -> jax.Array:
    """float32 log-probabilities of one pass over whole rows."""
    return jax.nn.log_softmax(model.logits(model(tokens).hidden))
