"""What the generator says of its tokens is what the trainer computes of them."""

import numpy as np
import pytest

from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding.generate import generate
from nemotron_jax.playing.engine_sampler import EngineSampler
from nemotron_jax.playing.sampler import SideBySide
from nemotron_jax.posttraining.policy_batch import score_tokens
from tests.tiny_models import random_tokens, tiny_model

# Every kind of layer; the two paths sum in other orders, in float32.
PATTERN, MTP, TOLERANCE = "M*E-M", "*E", 2e-4
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return tiny_model(PATTERN, MTP)


def scored(model, rows: list[list[int]], temperature: float = 1.0) -> np.ndarray:
    """The trainer's log-probability of each token after the first, rows padded.

    The tests share one shape, so one program.
    """
    tokens, targets, segments = (np.zeros((4, 32), np.int32) for _ in range(3))
    for place, row in enumerate(rows):
        tokens[place, : len(row)], targets[place, : len(row) - 1] = row, row[1:]
        segments[place, : len(row)] = 1
    options = {"execution": Execution(), "chunk": 64, "temperature": temperature}
    return np.asarray(score_tokens(model, tokens, targets, segments, **options))


@pytest.mark.parametrize(
    ("begin", "temperature"),
    [(SideBySide, 1.0), (SideBySide, 0.5), pytest.param(EngineSampler(4), 1.0, marks=SLOW)],
    ids=["rows", "cooler", "engine"],
)
def test_generator_and_trainer_agree_over_several_turns(model, begin, temperature) -> None:
    prompts = [random_tokens(0, 5).tolist(), random_tokens(1, 9).tolist()]
    options = {"max_tokens": 32, "stop_token": 7, "temperature": temperature, "seed": 3}
    sampler = begin(model, prompts, 2, **options)
    rows = [list(prompt) for prompt in prompts for _ in range(2)]
    logprobs = [[0.0] * len(row) for row in rows]
    for turn, limits in enumerate(([4, 3, 5, 0], [2, 6, 0, 3])):
        heard = [random_tokens(10 * turn + n, turn * (n + 1)).tolist() for n in range(4)]
        sampler.read(heard)
        for n, written in enumerate(sampler.write(limits)):
            assert len(written.tokens) <= limits[n]
            assert written.stopped == (7 in written.tokens) and 7 not in written.tokens[:-1]
            rows[n] += [*heard[n], *written.tokens]
            logprobs[n] += [*[0.0] * len(heard[n]), *written.logprobs]
    trainer, drawn = scored(model, rows, temperature), 0
    for n in range(len(rows)):
        own = np.flatnonzero(logprobs[n])
        drawn += len(own)
        np.testing.assert_allclose(trainer[n, own - 1], np.array(logprobs[n])[own], atol=TOLERANCE)
    assert drawn > 10 and rows[0] != rows[1]  # samples of one prompt differ


@pytest.mark.parametrize("drafts", [0, 2])
def test_generator_and_trainer_agree_with_and_without_drafts(model, drafts) -> None:
    prompts = [random_tokens(4, 6).tolist(), random_tokens(5, 3).tolist()]
    new = generate(model, prompts, 12, temperature=1.0, seed=1, speculative=drafts)
    rows = [[*p, *t[:n].tolist()] for p, t, n in zip(prompts, new.tokens, new.lengths, strict=True)]
    trainer = scored(model, rows)
    for n, prompt in enumerate(prompts):
        length = int(new.lengths[n])
        own = trainer[n, len(prompt) - 1 : len(prompt) - 1 + length]
        np.testing.assert_allclose(own, new.logprobs[n, :length], atol=TOLERANCE)


def test_the_engine_forgets_only_what_other_weights_computed() -> None:
    told = []

    class Engine:
        def replace_weights(self, model, version) -> None:
            told.append((float(model), version))

    sampler = EngineSampler(slots=4)
    sampler._engine = Engine()
    first, second = np.zeros(()), np.ones(())
    for model in (first, first, second, second, first):
        sampler.swap(model, max_tokens=32)
    assert told == [(0, 1), (1, 2), (0, 3)]
