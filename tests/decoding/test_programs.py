"""Decode programs are compiled for sizes, and never for who asks or how."""

import jax
import pytest

import nemotron_jax as nj
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding import lockstep
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.wanted import Budget, Wanted
from nemotron_jax.playing.conversations import OnSlots, SideBySide
from nemotron_jax.sharding import make_mesh
from tests.decoding.engines import old_model, quick_programs  # noqa: F401  # for all of this file
from tests.decoding.test_wanted import Cycle
from tests.tiny_models import random_tokens

# A text of this length in a batch that is kept has the capacity of one that is not.
LONGEST = 64
PROMPTS = [random_tokens(seed, 40).tolist() for seed in range(4)]
NEW = LONGEST - len(PROMPTS[0])
WAYS = [
    Wanted(NEW),
    Wanted(NEW, temperature=0.7, seed=1),
    Wanted(NEW, temperature=1.0, top_p=0.9, min_tokens=3),
    Wanted(NEW, temperature=1.0, top_k=5, logprobs="drawn"),
    Wanted(NEW, stop_tokens=(5, 6), logit_bias={7: 1.0}),
    Wanted(NEW, budget=Budget(2, 9)),
]


def asked(generator) -> None:
    """Four texts, each in every way, and each under a grammar of its own."""
    for wanted in WAYS:
        for prompt in PROMPTS:
            generator.submit(prompt, wanted)
        generator.run()
    for prompt in PROMPTS:
        generator.submit(prompt, Wanted(3, grammar=Cycle((5,), (6, 7), (8,))))
    generator.run()


def played(sampler) -> None:
    """Four conversations of a turn and another, as stage `grpo` plays them."""
    model, wanted = old_model(), WAYS[1]
    conversations = sampler(model, PROMPTS, 1, wanted)
    for _ in range(2):
        conversations.write([NEW // 2 - 1] * 4)
        conversations.read([[1]] * 4)


@pytest.mark.parametrize("drafts", [0, pytest.param(2, marks=pytest.mark.more)])
def test_side_by_side_there_is_one_program_whoever_asks(drafts) -> None:
    before = lockstep._decode._cache_size()
    asked(Lockstep(old_model(), speculative=drafts))
    nj.generate(old_model(), PROMPTS, NEW, temperature=[0.0, 0.5, 1.0, 2.0], speculative=drafts)
    played(SideBySide(LONGEST, drafts))
    assert lockstep._decode._cache_size() == before + 1
    nj.generate(old_model(), PROMPTS[:1], NEW, speculative=drafts)  # other sizes, another program
    assert lockstep._decode._cache_size() == before + 2


@pytest.mark.more  # programs of an engine of the usual sizes
@pytest.mark.parametrize("drafts", [0, 2])
def test_on_slots_there_is_one_program_whoever_asks(drafts) -> None:
    sampler = OnSlots(4, LONGEST, drafts)
    played(sampler)
    made = sampler._policy.generator.stats().programs
    first = jax.devices()[0]  # where episodes are played, whatever the mesh
    with jax.set_mesh(make_mesh(MeshConfig(), [first])):
        engine = Engine(jax.device_put(old_model(), first), sampler._config)
    asked(engine)
    assert engine.stats().programs == made
