"""The prefix cache, formats, devices and random traffic: no request is ever the worse for them."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.config.cache import CacheConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding import runner
from nemotron_jax.decoding.engine import QueueFull
from nemotron_jax.model.parameters import flatten, model_shardings, unflatten
from nemotron_jax.sharding import make_mesh
from tests.decoding import engines
from tests.decoding.engines import (
    GREEDY,
    NEW,
    PROMPTS,
    WAYS,
    alone,
    assert_alone,
    assert_empty,
    make,
    quick_programs,  # noqa: F401  # for all of this file
    submit,
)


@pytest.fixture(scope="module")
def model():
    return engines.old_model()


@pytest.fixture(scope="module")
def other_model():
    return engines.new_model()


@pytest.mark.parametrize("speculative", [0, 2])
def test_a_prefix_is_read_once_and_changes_no_answer(model, speculative):
    engine = make(model, speculative, prefix_cache=True)
    ask = lambda prompt, **options: submit(
        engine, prompt, **{"max_new_tokens": 10} | options
    ).wait()
    first = ask(PROMPTS[0], **GREEDY)
    assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (1, 0)
    again = ask(PROMPTS[0], **WAYS[1])  # the whole prompt is known, its first token drawn anew
    read = engine.stats().prompt_tokens
    assert read == len(PROMPTS[0]) and engine.stats().prefix_tokens == len(PROMPTS[0])
    assert_alone(first, alone(0, 0, speculative))
    assert_alone(again, alone(0, 1, speculative))
    turn = PROMPTS[0] + first.tokens + PROMPTS[4]  # goes on from where the first answer ended
    third = ask(turn, max_new_tokens=6, **WAYS[1])
    known = engine.stats().prompt_tokens - read
    # With drafts the last round's tokens were never in the cache.
    assert len(PROMPTS[4]) < known <= len(PROMPTS[4]) + 1 + speculative
    plain = submit(make(model, speculative), turn, max_new_tokens=6, **WAYS[1]).wait()
    assert third.tokens == plain.tokens
    np.testing.assert_allclose(third.logprobs, plain.logprobs, atol=2e-5)
    scored = ask(PROMPTS[0], prompt_logprobs=True)
    assert len(scored.prompt_logprobs) == len(PROMPTS[0]) - 1
    for token, own, (best, most) in zip(
        PROMPTS[0][1:], scored.prompt_logprobs, scored.prompt_likeliest, strict=True
    ):
        assert own == most if token == best else own < most
    assert_empty(engine)


def test_texts_that_go_on_differently_from_a_full_page_keep_their_own_drafts(model):
    engine = make(model, 2, prefix_cache=True)
    assert len(PROMPTS[0]) % 8 == 0
    submit(engine, PROMPTS[0], max_new_tokens=1, **GREEDY).wait()
    ways = (1, 2, 0)
    requests = [submit(engine, PROMPTS[0], max_new_tokens=NEW, **WAYS[way]) for way in ways]
    engine.run()
    assert engine.stats().prefix_hits == 3
    for way, request in zip(ways, requests, strict=True):
        assert_alone(request, alone(0, way, 2))
    assert_empty(engine)


def test_formats_of_the_cache_change_little_and_not_nothing(model):
    """Of pages in 8 bits and states in 16; the exact engine's figures are `alone`'s."""
    formats = CacheConfig(kv="float8_e4m3fn", states="float16")
    engine = make(model, cache=formats, prefix_cache=True)
    first, again = (submit(engine, PROMPTS[0], max_new_tokens=NEW, **GREEDY).wait() for _ in "ab")
    assert engine.stats().prefix_hits == 1
    assert first.tokens == again.tokens and first.logprobs == again.logprobs
    tokens, logprobs = alone(0, 0, 0)
    same = next((n for n in range(NEW) if first.tokens[n] != tokens[n]), NEW)
    assert same >= 3, "8 bits hold a key to 6 %"
    error = np.abs(np.array(first.logprobs[:same]) - logprobs[:same])
    assert 1e-5 < error.max() < 0.3
    with pytest.raises(ValueError, match="CacheConfig.kv='int4': must be one of auto"):
        CacheConfig(kv="int4")
    with pytest.raises(ValueError, match="CacheConfig.states"):
        CacheConfig(states="float8")


def test_new_weights_make_known_prefixes_void(model, other_model):
    engine = make(model, 2, prefix_cache=True)
    submit(engine, PROMPTS[0], max_new_tokens=4, **GREEDY).wait()
    running = submit(engine, PROMPTS[3], max_new_tokens=NEW, **GREEDY)
    engine.step()
    engine.replace_weights(other_model, "new")
    assert engine.stats().prefix_entries == 0
    running.wait()
    assert engine.stats().prefix_entries == 0, "its beginning is of the old weights"
    again = submit(engine, PROMPTS[0], max_new_tokens=NEW, **GREEDY).wait()
    assert_alone(again, alone(0, 0, 2, "new"))
    assert engine.stats().prefix_hits == 0 and engine.stats().prefix_entries > 0
    assert_empty(engine)


@pytest.mark.parametrize("speculative", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_are_gone_with_their_requests(model, speculative, value):
    """Pages, states and snapshots of a push that failed spoil nobody who comes after it."""
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), model)
    engine = make(model, speculative, prefix_cache=True)
    engine.replace_weights(broken, "broken")
    for _ in range(4):
        submit(engine, PROMPTS[0], max_new_tokens=3, **GREEDY)
    engine.run()
    beside = submit(engine, PROMPTS[0], max_new_tokens=NEW, **GREEDY)  # keeps what it has of them
    engine.step()
    assert not np.isfinite(beside.logprobs).any()
    engine.replace_weights(model, "old")
    asked = [(n, n % len(WAYS)) for n in (1, 4, 5, 6, 3)]
    requests = [submit(engine, PROMPTS[n], max_new_tokens=NEW, **WAYS[way]) for n, way in asked]
    engine.run()
    for request, (n, way) in zip(requests, asked, strict=True):
        assert_alone(request, alone(n, way, speculative))
    assert_empty(engine)


def interleave(models: dict, seed: int, moves: int) -> None:
    """Submit, step, cancel and swap weights at random; whatever lived between two swaps is as if
    alone."""
    draw, swaps, version = random.Random(seed), 0, "old"
    engine = make(models["old"], 2, prefix_cache=True)
    living: list[tuple] = []

    def come() -> None:
        n, way, new = draw.randrange(len(PROMPTS)), draw.randrange(len(WAYS)), draw.randint(1, NEW)
        count = draw.choice((1, 1, 3))
        found = submit(engine, PROMPTS[n], max_new_tokens=new, n=count, **WAYS[way])
        living.extend((r, n, way, swaps) for r in (found if count > 1 else [found]))

    def cancel() -> None:
        if living:
            draw.choice(living)[0].cancel()

    def swap() -> None:
        nonlocal version, swaps
        version, swaps = draw.choice(("old", "new")), swaps + 1
        engine.replace_weights(models[version], version)

    def settle() -> None:
        engine._scheduler.check_sums()
        for one in [one for one in living if one[0].done]:
            living.remove(one)
            request, n, way, then = one
            assert len(request.tokens) == len(request.logprobs) == len(request.versions)
            if then == swaps and request.branch == 0:
                assert set(request.versions) <= {version}
                assert_alone(request, alone(n, way, 2, version))

    for _ in range(moves):
        draw.choices((come, engine.step, cancel, swap), (6, 12, 2, 1))[0]()
        settle()
    while engine.step():
        settle()
    settle()
    assert not living
    assert_empty(engine)


def test_random_traffic_changes_no_request(model, other_model, monkeypatch):
    monkeypatch.setattr(runner, "_MOST_SLOTS_WHOLE", 3)
    monkeypatch.setattr(runner, "_FEW_ROWS", 2)  # and so two rows have a program of their own
    interleave({"old": model, "new": other_model}, seed=0, moves=60)


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp", [(4, 1), (2, 2)])
def test_a_model_that_devices_share_is_served_as_it_is(model, data, fsdp):
    config = MeshConfig(data=data, fsdp=fsdp)
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        places = model_shardings(model, mesh)
        placed = unflatten(
            model, {name: jax.device_put(a, places[name]) for name, a in flatten(model).items()}
        )
        engine = make(placed, 2, prefix_cache=True)
        programs = engine.stats().programs
        requests = [submit(engine, PROMPTS[n], max_new_tokens=NEW, **WAYS[n % 3]) for n in range(6)]
        engine.run()
        again = submit(engine, PROMPTS[5], max_new_tokens=NEW, **WAYS[2])  # the newest prefix
        requests.append(again.wait())
        assert engine.stats().programs == programs and engine.stats().prefix_hits == 1
    for n, request in zip((*range(6), 5), requests, strict=True):
        assert_alone(request, alone(n, n % 3, 2))
    assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_long_random_traffic_changes_no_request(model, other_model, seed):
    interleave({"old": model, "new": other_model}, seed=seed, moves=800)


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(model):
    """Random cancels, prompts too long and values that are wrong; memory stays flat."""
    draw, engine = random.Random(1), make(model, 2, max_waiting=12)
    memory, refused, requests = [], 0, []
    for number in range(2000):
        bad = draw.random() < 0.1
        prompt = [5] * draw.randint(1, 60 if bad else 16)
        options = {"temperature": draw.choice((0.0, 1.0, -1.0 if bad else 0.5)), "seed": number}
        try:
            request = submit(engine, prompt, max_new_tokens=draw.randint(1, NEW), **options)
            requests.append(request)
        except (ValueError, QueueFull):
            refused += 1
        if draw.random() < 0.2 and requests:
            draw.choice(requests[-20:]).cancel()
        engine.step()
        if number % 500 == 499:
            memory.append(sum(array.nbytes for array in jax.live_arrays()))
    engine.run()
    assert refused > 50 and all(request.done for request in requests)
    assert max(memory) - min(memory) < 100_000, "device memory grows"
    assert_empty(engine)
