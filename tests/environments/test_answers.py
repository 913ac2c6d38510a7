"""Answers, numbers and quantities are read strictly: what is ambiguous is no answer."""

from fractions import Fraction

import pytest

from nemotron_jax.environments import Draws
from nemotron_jax.environments.answers import final_answer, number, plain
from nemotron_jax.environments.instructions import one_letter_apart
from nemotron_jax.environments.units import quantity


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("Answer: 42", "42"),
        ("It is so.\n**Answer: 42**", "42"),
        ("Final answer = x y", "x y"),
        ("so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("\\boxed{7} and again \\boxed{7}", "7"),
        ("\\boxed{7} or \\boxed{8}", None),
        ("Answer: 1\nAnswer: 2", None),
        ("Answer: 1\nor so", None),
        ("two\nlines", None),
        ("\\boxed{7", ""),
        ("Answer:", None),
        ("", None),
        ("x" * 3000, None),
    ],
)
def test_a_text_gives_one_answer_or_none(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("-3.50", Fraction(-7, 2)), ("1,200", 1200), ("2/3", Fraction(2, 3)),
     ("6.02e3", 6020), (".5", Fraction(1, 2)), ("$7$.", 7), ("\u22124", -4), ("1/0", None),
     ("12,34", None), ("1e9999", None), ("0x10", None), ("\u0663", None), ("\uff11", None),
     ("1 2", None), ("", None), ("9" * 41, None), ("1_000", None), ("inf", None), ("nan", None)],
)  # fmt: skip
def test_numbers_are_plain_ascii_ones(text: str, value: object) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("one", "other"),
    [("0.5 kN", "500 kg*m/s^2"), ("1 L", "1000 cm^3"), ("36 km/h", "10 m/s"), ("1 V", "1 J/C"),
     ("2 W", "2000 mJ/s"), ("1 Pa", "1 N/m^2"), ("3 kohm", "3000 V/A"), ("1.5e3 m", "1.5 km"),
     ("2 x 10^3 J", "2 kJ"), ("4 m\u00b2", "40000 cm^2")],
)  # fmt: skip
def test_equal_quantities_are_equal(one: str, other: str) -> None:
    assert quantity(one) == quantity(other) is not None


@pytest.mark.parametrize(
    "text",
    ["5", "5 q", "kg", "5 kg/", "5 m/s/s", "5 kkg", "5 m^99", "5 " + "m*" * 30, "1e999999 m"],
)
def test_what_is_no_quantity_is_none(text: str) -> None:
    assert quantity(text) is None


def test_names_are_compared_without_case_and_marks() -> None:
    assert plain(' "The  Answer". ') == plain("the answer")


def test_one_letter_apart_is_a_distance_of_one() -> None:
    """Against the recurrence for the distance with swaps of neighbours."""

    def distance(a: str, b: str) -> int:
        rows = {
            (i, j): max(i, j) for i in range(len(a) + 1) for j in range(len(b) + 1) if not i * j
        }
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                change = rows[i - 1, j - 1] + (a[i - 1] != b[j - 1])
                rows[i, j] = min(rows[i - 1, j] + 1, rows[i, j - 1] + 1, change)
                if i > 1 and j > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
                    rows[i, j] = min(rows[i, j], rows[i - 2, j - 2] + 1)
        return rows[len(a), len(b)]

    draws, near = Draws("letters"), 0
    for _ in range(2000):
        a, b = ("".join(draws.choice("abc") for _ in range(draws.between(1, 4))) for _ in "ab")
        if a != b:
            assert one_letter_apart(a, b) == (distance(a, b) == 1), (a, b)
            near += one_letter_apart(a, b)
    assert near > 100
