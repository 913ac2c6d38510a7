"""Whatever ends a step, every request goes on to what it is given where nothing goes wrong."""

import itertools
import random
import sys
from collections.abc import Callable

import pytest

from nemotron_jax.decoding import engine as engine_module
from nemotron_jax.decoding.engine import Engine
from tests.decoding.engines import assert_empty, submit
from tests.decoding.fake_runner import VOCABULARY, expected

KINDS = [(k, prefix) for k in (0, 2) for prefix in (False, True)]


class Fault(Exception):
    """What a device may raise."""


def ask(engine: Engine, seed: int = 0) -> list:
    """Samples of two prompts in groups, and others beside them, more than fit at once."""
    draw, requests = random.Random(seed), []
    for n, length, new in ((3, 13, 9), (1, 20, 12), (2, 16, 11), (1, 1, 15), (1, 13, 7)):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        wanted = {"seed": draw.randrange(9), "stop_tokens": (draw.randrange(3, VOCABULARY),)}
        found = submit(engine, prompt, max_new_tokens=new, n=n, prompt_logprobs=n == 2, **wanted)
        requests += found if isinstance(found, list) else [found]
    return requests


def assert_as_if_alone(engine: Engine, requests: list) -> None:
    for request in requests:
        tokens, logprobs, reason = expected(request, engine.config.speculative)
        assert (request.tokens, request.finish_reason) == (tokens, reason)
        assert request.logprobs == logprobs
        assert request.versions == ["old"] * len(tokens)
        known = request.prompt_logprobs
        assert known is None or len(known) == len(request.prompt) - 1
    assert engine.stats().finished == len(requests)
    given = sum(len(request.tokens) for request in requests)
    assert engine.stats().new_tokens == given
    if engine.config.speculative:  # the first token of each is its prompt's
        found = engine.stats().acceptance
        rounds = found.drafted / engine.config.speculative
        assert found.mean_length == pytest.approx((given - len(requests)) / rounds)
    assert_empty(engine)


@pytest.mark.parametrize("speculative, prefix", KINDS)
def test_a_program_that_ends_badly_costs_no_token(fake, speculative, prefix):
    """Before each call of each program, in it so that the store is lost, and after it."""
    for stage, number in itertools.product(("before", "inside", "after"), range(0, 36, 3)):
        engine = fake(speculative, prefix_cache=prefix)
        requests, calls = ask(engine), itertools.count()
        error = KeyboardInterrupt if number % 2 else Fault

        def fault(name: str, at: str, calls=calls, stage=stage, number=number, error=error) -> None:
            if at == stage and next(calls) in (number, number + 2):
                raise error(name)

        engine._runner.fault = fault
        ends = 0
        while not all(request.done for request in requests):
            try:
                engine.run()
            except error:
                ends += 1
            assert ends < 4
        assert_as_if_alone(engine, requests)


def interrupted_at(line: int, call: Callable[[], None]) -> bool:
    """Whether a call came to so many lines of the engine's own code, and was interrupted there."""
    left, folder = [line], engine_module.__file__.rsplit("/", 1)[0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def interrupt_every(fake, speculative: int, prefix: bool, step: int) -> int:
    """Interrupts a run at every so many lines, each a run of its own; how many there were."""
    for number in itertools.count():
        engine = fake(speculative, prefix_cache=prefix)
        requests = ask(engine)
        requests.append(submit(engine, [9] * 5, max_new_tokens=9))
        requests[-1].cancel()
        place = number * step + number % step  # not always the same lines of a loop
        if not interrupted_at(place, engine.run):
            return number
        interrupted_at(place % 200, engine.run)  # and once more while it begins anew
        engine.run()
        assert requests.pop().finish_reason == "cancelled" and engine.stats().cancelled == 1
        assert_as_if_alone(engine, requests)


@pytest.mark.parametrize("speculative, prefix", KINDS)
def test_an_interrupt_at_any_line_costs_no_token(fake, speculative, prefix):
    assert interrupt_every(fake, speculative, prefix, 97) > 8


@pytest.mark.slow
@pytest.mark.parametrize("speculative, prefix", KINDS)
def test_an_interrupt_at_every_line_costs_no_token(fake, speculative, prefix):
    assert interrupt_every(fake, speculative, prefix, 1) > 1000
