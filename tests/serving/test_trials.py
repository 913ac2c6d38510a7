"""A grammar that would take minutes is refused in time, and nobody else waits for it."""

import concurrent.futures
import os
import signal
import time
from collections.abc import Iterator

import pytest

from nemotron_jax.serving import app, grammars, trials
from nemotron_jax.serving.trials import Trials
from tests.serving.live import TOKENIZER, Live, live
from tests.serving.test_formats import BOUNDED, json_schema

llguidance = pytest.importorskip("llguidance")


def endless(seed: int = 0) -> dict:
    """Texts that hold 26 letters in any order: an automaton of 2**26 states."""
    letters = [chr(97 + seed % 1000 + n) for n in range(26)]
    return {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in letters]}


def source(schema: dict) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trials]:
    monkeypatch.setattr(trials, "MOST_CPU_S", 0.2)
    grammars._language_of.cache_clear()
    yield grammars._language_of(TOKENIZER).trials
    grammars._language_of.cache_clear()


def test_what_takes_long_ends_and_the_next_is_tried(quick: Trials) -> None:
    assert quick.of(source(BOUNDED)).error == ""
    (first,) = quick._idle
    began = time.monotonic()
    assert "to be compiled" in quick.of(source(endless())).error
    assert first.poll() == -signal.SIGPROF and not quick._idle
    assert time.monotonic() - began < trials.MOST_S + 1
    began = time.monotonic()
    assert "to be compiled" in quick.of(source(endless())).error  # it is remembered
    assert time.monotonic() - began < 0.1 and not quick._idle
    assert quick.of(source(BOUNDED)).error == "" and "nothing" in quick.of(source(NOTHING)).error
    (one,) = quick._idle
    os.kill(one.pid, signal.SIGKILL)  # as a system without memory does
    one.wait()
    assert quick.of(source(BOUNDED)).error == ""


NOTHING = {"type": "nothing"}


def test_what_is_forced_is_tried_too(quick: Trials) -> None:
    for schema in ({"type": "null"}, {"const": "é\\n☺" * 400}, {"enum": ["ab", "ac"]}):
        assert quick.of(source(schema)).error == ""


def test_costly_formats_hold_up_nobody(quick: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_GRAMMAR_WAIT_S", 0.5)
    off = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 1}
    ask = lambda one, schema: one.post(response_format=json_schema(schema), **off)
    with live(waiting=64) as one, concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert ask(one, BOUNDED).status_code == 200
        attacks = [pool.submit(ask, one, endless(seed)) for seed in range(12)]
        began = time.monotonic()
        assert plain(one) == 200
        took = time.monotonic() - began
        statuses = [attack.result().status_code for attack in attacks]
        assert set(statuses) <= {400, 429} and statuses.count(400) >= 2
        assert any(not attack.done() for attack in attacks) or took < 2
        assert ask(one, BOUNDED).status_code == 200


def plain(one: Live) -> int:
    return one.post(max_tokens=1).status_code
