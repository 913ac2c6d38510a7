"""Every source keeps within one row of its share, and a row's place needs no history."""

import random

import pytest

from nemotron_jax.data.mixture import LONGEST_PERIOD, Mixture

WEIGHTS = [
    (1.0,),
    (0.3, 0.7),
    (2.0, 1.0, 1.0),
    (0.1, 0.2, 0.3, 0.4),
    (5.0, 0.01, 0.01, 0.01),
    (1 / 3, 2 / 3),
    tuple(map(float, random.Random(0).choices(range(1, 1000), k=9))),
    tuple((n * 0.618033988749895) % 1 for n in range(1, 8)),  # no short period
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counters_stay_within_one_row_of_their_shares(weights):
    mixture = Mixture(weights)
    given = [0] * len(weights)
    for row in range(3000):
        assert mixture.counters(row) == given
        source, before = mixture.place(row)
        assert before == given[source]  # so that each source's rows are used once, in order
        given[source] += 1
        for share, count in zip(mixture.shares, given, strict=True):
            assert abs(count - share * (row + 1)) < 1 + 1e-9
    total = sum(weights)
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert share == pytest.approx(weight / total, abs=1 / LONGEST_PERIOD)


def test_decimal_weights_are_exact_for_ever():
    mixture = Mixture((0.3, 0.7))
    assert mixture.period == 10
    assert mixture.counters(10**15) == [3 * 10**14, 7 * 10**14]
    far = 10**15 + 4
    source, before = mixture.place(far)
    assert before == mixture.counters(far)[source]


def test_the_bound_holds_over_a_whole_rounded_period():
    mixture = Mixture(WEIGHTS[-1])
    assert mixture.period == LONGEST_PERIOD
    for rows in range(0, LONGEST_PERIOD + 1, 97):
        for share, count in zip(mixture.shares, mixture.counters(rows), strict=True):
            assert abs(count - share * rows) < 1
    assert mixture.counters(LONGEST_PERIOD) == [
        round(share * LONGEST_PERIOD) for share in mixture.shares
    ]


def test_a_weight_too_small_for_a_row_is_an_error():
    with pytest.raises(ValueError, match="source 0 less than one of 65536 rows"):
        Mixture((1e-9, 1.0))


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (float("inf"), 1.0)])
def test_unusable_weights_are_an_error(weights):
    with pytest.raises(ValueError, match="must all be positive and finite"):
        Mixture(weights)
