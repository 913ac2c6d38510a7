"""Draws are even, and the same everywhere."""

import collections

import pytest

from nemotron_jax.environments import Draws

SEQUENCE, ORDER = [43, 24, 40, 32, 21, 23], "eabcdf"


def test_the_sequence_is_fixed() -> None:
    """Written down on Python 3.11: another number means other tasks for everybody."""
    draws = Draws("sequence", 1, None)
    assert [draws.below(100) for _ in range(6)] == SEQUENCE
    assert "".join(Draws("order").shuffled("abcdef")) == ORDER


def test_every_number_is_as_likely() -> None:
    draws = Draws("even")
    counts = collections.Counter(draws.below(7) for _ in range(70_000))
    # Five standard deviations of a count of 10,000.
    assert set(counts) == set(range(7)) and all(abs(n - 10_000) < 465 for n in counts.values())


def test_every_order_is_as_likely() -> None:
    draws = Draws("orders")
    shuffles = collections.Counter("".join(draws.shuffled("abc")) for _ in range(12_000))
    samples = collections.Counter("".join(draws.sample("abcd", 2)) for _ in range(12_000))
    assert len(shuffles) == 6 and all(abs(count - 2000) < 205 for count in shuffles.values())
    assert len(samples) == 12 and all(abs(count - 1000) < 152 for count in samples.values())


def test_bounds_and_errors() -> None:
    draws = Draws("bounds")
    assert {draws.between(-1, 1) for _ in range(100)} == {-1, 0, 1}
    assert draws.below(1) == 0 and sorted(draws.sample(range(5), 5)) == list(range(5))
    with pytest.raises(ValueError, match="count=0"):
        draws.below(0)
    with pytest.raises(ValueError, match="4 of 3 items"):
        draws.sample("abc", 4)
