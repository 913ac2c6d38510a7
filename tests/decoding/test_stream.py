"""Streamed tokens are those that generation gives, one at a time; a spent budget ends thinking."""

import pytest

from nemotron_jax.decoding import stream
from nemotron_jax.decoding.generate import generate
from nemotron_jax.decoding.sampling import Sampling
from nemotron_jax.decoding.stream import stream_tokens
from tests.tiny_models import random_tokens, tiny_model

PROMPT = random_tokens(21, 21).tolist()
GREEDY = Sampling.create(0.0)


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """The prompt takes three chunks, the last of them not full."""
    patch = pytest.MonkeyPatch()
    patch.setattr(stream, "PREFILL_CHUNK", 8)
    patch.setattr(stream, "CAPACITY_STEP", 64)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model():
    return tiny_model("M*E")


@pytest.fixture(scope="module")
def greedy(model) -> list[int]:
    return generate(model, [PROMPT], 12).tokens[0].tolist()


def streamed(model, count: int = 12, **options) -> list[int]:
    options = {"sampling": GREEDY, "stop_tokens": ()} | options
    return list(stream_tokens(model, PROMPT, count, **options))


def test_greedy_tokens_are_those_of_generate(model, greedy: list[int]) -> None:
    assert streamed(model) == greedy


def test_a_stop_token_is_the_last(model, greedy: list[int]) -> None:
    stop = greedy[5]
    assert streamed(model, stop_tokens=(stop,)) == greedy[: greedy.index(stop) + 1]


def test_a_spent_budget_puts_its_token_and_the_model_goes_on_from_it(model, greedy) -> None:
    token = next(token for token in range(53) if token not in greedy)
    cut = streamed(model, budget=4, budget_token=token)
    after = generate(model, [PROMPT + greedy[:4] + [token]], 7).tokens[0].tolist()
    assert cut == [*greedy[:4], token, *after]
    assert streamed(model, budget=0, budget_token=token)[0] == token


def test_a_budget_is_met_by_a_model_that_ends_its_reasoning_itself(model, greedy) -> None:
    assert streamed(model, budget=6, budget_token=greedy[2]) == greedy


@pytest.mark.parametrize("prompt", [[], [1, 53], [-1]])
def test_a_prompt_that_the_model_cannot_read_is_refused(model, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="empty or holds ids outside"):
        list(stream_tokens(model, prompt, 1, sampling=GREEDY, stop_tokens=()))
