"""Whoever asks a model to go on gets the same: tokens and log-probabilities, turn after turn."""

import dataclasses

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.decoding.wanted import Budget, Wanted
from nemotron_jax.playing.conversations import OnSlots, Policy, SideBySide
from nemotron_jax.sharding import make_mesh, replicated
from nemotron_jax.terminal import engine_writer
from tests.decoding.engines import (
    NEW,
    PROMPTS,
    log_probabilities,
    make,
    old_model,
    quick_programs,
)
from tests.tiny_models import random_tokens, tiny_model

__all__ = ["quick_programs"]

TOLERANCE = 2e-5  # in float32 other shapes add up in another order
LENGTH, STOP, CLOSING = 40, 7, 9
WAYS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7},
    "plain": {"temperature": 1.0},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
    "budget": {"temperature": 1.0, "budget": Budget(4, CLOSING)},
    "closed": {"temperature": 0.0, "budget": Budget(0, CLOSING)},
}


def sampler(kind: str, speculative: int):
    if kind == "rows":
        return SideBySide(LENGTH, speculative)
    on_slots = OnSlots(4, LENGTH, speculative)
    on_slots._policy._make = lambda model, execution: make(model, speculative, prefix_cache=True)
    return on_slots


@pytest.mark.parametrize("speculative", [0, 2])
@pytest.mark.parametrize("kind", ["rows", "slots"])
def test_turns_are_those_of_generate_and_of_one_pass_over_the_whole(kind, speculative) -> None:
    model, prompt, begin = old_model(), PROMPTS[3], sampler(kind, speculative)
    for name, way in WAYS.items():
        wanted = Wanted(NEW, seed=5, stop_tokens=(STOP,), logprobs="drawn", **way)
        talks = begin(model, [prompt], 4, wanted, Execution())
        first = talks.write([NEW] * 4)
        (seed,) = talks._prompt_seeds
        options = {"seed": seed, "stop_tokens": (STOP,), "speculative": speculative, **way}
        found = nj.generate(model, [prompt] * 4, NEW, logprobs="drawn", **options)
        rows = []
        for row, written in enumerate(first):
            count = found.lengths[row]
            assert list(written.tokens) == found.tokens[row, :count].tolist(), name
            assert list(written.forced) == found.forced[row, :count].tolist()
            assert written.stopped == (STOP in written.tokens)
            np.testing.assert_allclose(
                written.logprobs, found.logprobs[row, :count], atol=TOLERANCE, err_msg=name
            )
            rows.append([(token, None) for token in prompt])
            rows[row] += zip(written.tokens, written.logprobs, strict=True)
        budgeted = "budget" in way
        assert any(any(one.forced) for one in first) == budgeted
        if budgeted:
            continue
        heard = [random_tokens(row, row % 3).tolist() for row in range(4)]
        talks.read(heard)
        limits = [
            max(min(2 + row, LENGTH - len(rows[row]) - len(heard[row])), 0) for row in range(4)
        ]
        for row, written in enumerate(talks.write(limits)):
            assert len(written.tokens) <= limits[row]
            rows[row] += [(token, None) for token in heard[row]]
            rows[row] += zip(written.tokens, written.logprobs, strict=True)
        if "top_p" not in way:
            check_by_one_pass(model, rows, way["temperature"])


def check_by_one_pass(model, rows, temperature: float) -> None:
    tokens = np.zeros((4, LENGTH), np.int32)
    for row, pairs in enumerate(rows):
        tokens[row, : len(pairs)] = [token for token, _ in pairs]
    likely = np.asarray(log_probabilities(model, tokens), np.float64) / (temperature or 1e-6)
    likely -= np.logaddexp.reduce(likely, axis=-1, keepdims=True)
    for row, pairs in enumerate(rows):
        for place, (token, logprob) in enumerate(pairs):
            if logprob is not None:
                expected = likely[row, place - 1, token]
                assert logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("speculative", [0, 2])
def test_a_chats_turns_are_those_of_generate_and_read_little_again(speculative) -> None:
    model, tokenizer = old_model(), train_tokenizer([], 272)
    engine = make(model, speculative, prefix_cache=True, tokenizer=tokenizer)
    wanted = Wanted(NEW, temperature=0.8, top_p=0.95, seed=3)
    write, prompt, unread = engine_writer(engine, wanted, LENGTH), PROMPTS[4], 7
    options = {"temperature": 0.8, "top_p": 0.95, "speculative": speculative}
    for turn in range(2):
        before = engine.stats().prompt_tokens
        new = list(write(prompt))
        found = nj.generate(model, [prompt], NEW, seed=3 + turn, **options)
        assert new == found.tokens[0].tolist()
        assert engine.stats().prompt_tokens - before == unread
        if turn == 0:
            prompt = [*prompt, *new[:6], 1, 2]  # as where the template drops some of a turn
            unread = 8
    # A string ends the turn where it does in `generate`, within an accepted draft too.
    place = next(n for n in range(2, NEW) if min(new[n - 1 : n + 1]) >= 16)  # no special tokens
    stops = {"stop_strings": tokenizer.decode(new[place - 1 : place + 1]), "seed": 4}
    (stopped,) = nj.generate(model, [prompt], NEW, tokenizer=tokenizer, **stops, **options).lengths
    again = engine_writer(engine, dataclasses.replace(wanted, **stops), LENGTH)
    assert list(again(prompt)) == new[:stopped] and stopped <= place + 1 < NEW
    cut_off = write(PROMPTS[0])
    next(cut_off)
    cut_off.close()
    assert not engine.step() and engine.stats().cancelled == 1
    with pytest.raises(ValueError, match="no room to answer"):
        next(write([1] * LENGTH))


def test_greedy_turns_are_the_same_with_drafts_and_without() -> None:
    turns = []
    for speculative in (0, 2):
        wanted = Wanted(NEW, stop_tokens=(STOP,), logprobs="drawn")
        begin = sampler("rows", speculative)
        talks = begin(old_model(), [PROMPTS[3]], 4, wanted, Execution())
        talks.read([[row] for row in range(4)])
        turns.append([one.tokens for one in talks.write([NEW] * 4)])
    assert turns[0] == turns[1] and len(set(turns[0])) > 1


def test_a_run_in_bfloat16_plays_in_it() -> None:
    policy = Policy(SideBySide(LENGTH)._make)
    policy.swap(tiny_model("M"), Execution(compute_dtype="bfloat16"))
    assert policy.generator.model.embedding[...].dtype == "bfloat16"


def test_a_policy_forgets_only_what_other_weights_computed() -> None:
    told = []

    class Generator:
        def __init__(self, model, execution) -> None:
            told.append((float(model), execution.compute_dtype))

        def replace_weights(self, model, version) -> None:
            told.append((float(model), version))

    policy = Policy(Generator)
    first, second = np.zeros(()), np.ones(())
    for model in (first, first, second, second, first):
        policy.swap(model, Execution())
    policy.swap(first, Execution(compute_dtype="bfloat16"))
    assert told == [(0, "auto"), (1, 2), (0, 3), (0, "bfloat16")]


def test_one_device_plays_with_weights_of_a_run_on_several() -> None:
    """As stage `grpo` does with sampler=engine: the second model is what a step has made."""
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    execution = Execution(compute_dtype="bfloat16")
    asked = [PROMPTS[0]], 2, Wanted(NEW, temperature=1.0), execution
    alone, sampler, models = (
        OnSlots(2, 64),
        OnSlots(2, 64),
        [tiny_model("M*E", seed=n) for n in (0, 1)],
    )
    for model in models:
        expected = [one.tokens for one in alone(model, *asked).write([8, 8])]
        with jax.set_mesh(mesh):
            spread = jax.device_put(model, replicated(mesh))
            found = [one.tokens for one in sampler(spread, *asked).write([8, 8])]
        assert found == expected
