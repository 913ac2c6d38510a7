"""Drafts are taken where they pay, by what they cost and how often they stand."""

import itertools
import math

import numpy as np
import pytest

from nemotron_jax.config.engine import AUTO_DRAFTS, EngineConfig
from nemotron_jax.decoding import choice
from nemotron_jax.decoding.choice import MARGIN, Costs, Drafts, choose_k, costs_of, mean_length
from tests.decoding import engines
from tests.decoding.engines import alone, assert_alone, make, programs, quick_programs, submit  # noqa: F401

KS = AUTO_DRAFTS[1:]
TABLE = list(
    itertools.product(
        (0.02, 0.1, 0.24, 0.6),  # of a draft
        (0.05, 0.4, 1.0),  # more, for each token that is verified
        (0.0, 0.2, 0.5, 0.74, 0.9, 1.0),  # chance that a draft stands
        (0, *KS),  # in use
    )
)


def shares(chance: float) -> list[float]:
    return [chance**n for n in range(1, max(KS) + 1)]


def worth(k: int, draft: float, verify: dict[int, float], by_position: list[float]) -> float:
    return (1 + sum(by_position[:k])) / (k * draft + verify[k]) if k else 1.0


def test_no_drafts_wherever_the_length_is_at_most_their_cost() -> None:
    seen = set()
    for draft, token, chance, now in TABLE:
        verify = {k: 1 + token * k for k in KS}
        by_position = shares(chance)
        k = choose_k(draft, verify, by_position, now=now)
        lose = all(1 + sum(by_position[:n]) <= n * draft + verify[n] for n in KS)
        assert k == 0 if lose else worth(k, draft, verify, by_position) >= 1
        best = max(worth(n, draft, verify, by_position) for n in (0, *KS))
        assert worth(k, draft, verify, by_position) * (1 + MARGIN) >= best
        seen.add((k, lose))
    assert seen == {(0, True), (0, False), *((k, False) for k in KS)}


def test_what_breaks_even_is_not_taken_and_stays_for_no_moment() -> None:
    verify = {1: 1.4}
    assert choose_k(0.1, verify, [0.5], now=1) == 0  # 1.5 tokens for 1.5 rounds
    assert choose_k(0.1, verify, [0.51], now=1) == 1
    assert choose_k(0.1, verify, [0.51], now=0) == 0  # not worth a change
    assert choose_k(0.1, verify, [0.60], now=0) == 1
    assert choose_k(math.nan, verify, [0.9], now=1) == 0


def test_the_choice_stays_while_another_is_hardly_better() -> None:
    verify, by_position = {1: 1.2, 3: 1.6}, [0.7, 0.45, 0.3]
    one, three = (worth(k, 0.1, verify, by_position) for k in (1, 3))
    assert 1 < max(one, three) / min(one, three) < 1 + MARGIN
    assert choose_k(0.1, verify, by_position, now=1) == 1
    assert choose_k(0.1, verify, by_position, now=3) == 3


def test_a_place_that_was_never_reached_is_as_the_one_before() -> None:
    assert mean_length([0.5], 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert mean_length([], 1) == 1 + choice.STANDS
    assert mean_length([0.5, 0.0], 5) == 1.5
    assert mean_length([0.9, 0.8], 0) == 1


def round_of(k: int, stood: int) -> np.ndarray:
    """The places of a round's tokens, of which the last is the model's own."""
    places = np.zeros(2 * (max(KS) + 1), int)
    places[[2 * n + 1 for n in range(stood)]] = 1
    places[2 * stood] = 1
    return places


CHEAP = {8: Costs(0.05, {1: 1.1, 3: 1.3, 5: 1.6}), 1: Costs(0.3, {1: 1.9, 3: 3.4, 5: 5.0})}


def test_drafts_that_never_stand_end_and_those_that_do_come_back() -> None:
    drafts = Drafts(AUTO_DRAFTS, CHEAP)
    assert drafts.next(8) > 0
    for _ in range(60):
        k = drafts.next(8)
        drafts.learn(k, round_of(k, 0) * 8)
    assert drafts.k == 0 and drafts.by_position[0] < 0.15
    tried = []
    for _ in range(320):
        k = drafts.next(8)
        tried.append(k)
        drafts.learn(k, round_of(k, 0) * 8)
    assert sum(k > 0 for k in tried) == 10  # now and then
    for _ in range(1000):
        k = drafts.next(8)
        drafts.learn(k, round_of(k, k) * 8)
    assert drafts.k == 5


def test_costs_are_those_of_as_many_rows() -> None:
    drafts = Drafts(AUTO_DRAFTS, CHEAP)
    assert drafts.next(8) > 0 and drafts.draft_cost == 0.05
    assert drafts.next(1) == 0 and drafts.draft_cost == 0.3
    assert drafts.verify_cost == 1.9  # of the fewest, where none are drafted
    given = Drafts((3,))
    assert given.next(8) == given.k == 3 and given.draft_cost is given.verify_cost is None


def test_costs_come_of_seconds() -> None:
    found = costs_of({0: 2.0, 1: 3.0, 3: 4.0}, 0.5)
    assert found == Costs(0.25, {1: 1.25, 3: 1.25})


@pytest.mark.parametrize("value", ["some", -1, 33, 1.5, None, True])
def test_other_numbers_of_drafts_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"EngineConfig\.speculative=.*: must be an integer"):
        EngineConfig(speculative=value)


@pytest.mark.more
def test_an_engine_that_chooses_gives_the_same_tokens_and_compiles_nothing(monkeypatch) -> None:
    """Whatever it chooses, call by call: the MTP block's cache is whole wherever drafts begin."""
    engine = make(engines.old_model(), "auto", prefix_cache=True)
    made, calls = programs(), itertools.cycle((0, 3, 0, 0, 1, 5))
    assert engine.stats().draft_cost > 0 and engine.stats().verify_cost > 0
    used = []
    monkeypatch.setattr(engine._drafts, "next", lambda rows: used.append(next(calls)) or used[-1])
    for _ in range(2):  # the second time from what the prefix cache holds
        requests = [submit(engine, engines.PROMPTS[n], max_new_tokens=24) for n in range(6)]
        engine.run()
        for n, request in enumerate(requests):
            assert_alone(request, alone(n, 0, 0))
    assert set(used) == set(AUTO_DRAFTS) and programs() == made
    stats = engine.stats()
    assert stats.acceptance.drafted > stats.acceptance.accepted > 0
    fixed = make(engines.old_model(), 3)
    for n in range(6):
        submit(fixed, engines.PROMPTS[n], max_new_tokens=24)
    fixed.run()
    # Drafts that begin after rounds without stand as often: nothing of the text is missing there.
    first = stats.acceptance.by_position[0]
    assert first == pytest.approx(fixed.stats().acceptance.by_position[0], abs=0.15)


@pytest.mark.more
def test_a_model_without_a_drafter_chooses_none() -> None:
    engine = make(engines.tiny_model("M*E"), "auto")
    assert (engine.stats().speculative, engine.stats().acceptance) == (0, None)
