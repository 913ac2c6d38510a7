"""Quantities: a number with a unit, exact, so that 0.5 kN equals 500 kg*m/s^2."""

import re
from fractions import Fraction

from nemotron_jax.environments.answers import number

# Exponents of metre, kilogram, second, ampere, kelvin, mole.
Dimension = tuple[int, int, int, int, int, int]
_PREFIXES = {"G": 9, "M": 6, "k": 3, "d": -1, "c": -2, "m": -3, "u": -6, "\u00b5": -6, "n": -9}
_PREFIXED: dict[str, tuple[Fraction, Dimension]] = {
    "m": (Fraction(1), (1, 0, 0, 0, 0, 0)),
    "g": (Fraction(1, 1000), (0, 1, 0, 0, 0, 0)),
    "s": (Fraction(1), (0, 0, 1, 0, 0, 0)),
    "A": (Fraction(1), (0, 0, 0, 1, 0, 0)),
    "K": (Fraction(1), (0, 0, 0, 0, 1, 0)),
    "mol": (Fraction(1), (0, 0, 0, 0, 0, 1)),
    "N": (Fraction(1), (1, 1, -2, 0, 0, 0)),
    "J": (Fraction(1), (2, 1, -2, 0, 0, 0)),
    "W": (Fraction(1), (2, 1, -3, 0, 0, 0)),
    "Pa": (Fraction(1), (-1, 1, -2, 0, 0, 0)),
    "Hz": (Fraction(1), (0, 0, -1, 0, 0, 0)),
    "C": (Fraction(1), (0, 0, 1, 1, 0, 0)),
    "V": (Fraction(1), (2, 1, -3, -1, 0, 0)),
    "ohm": (Fraction(1), (2, 1, -3, -2, 0, 0)),
    "\u03a9": (Fraction(1), (2, 1, -3, -2, 0, 0)),
    "\u2126": (Fraction(1), (2, 1, -3, -2, 0, 0)),
    "L": (Fraction(1, 1000), (3, 0, 0, 0, 0, 0)),
}
_WHOLE: dict[str, tuple[Fraction, Dimension]] = {
    "min": (Fraction(60), (0, 0, 1, 0, 0, 0)),
    "h": (Fraction(3600), (0, 0, 1, 0, 0, 0)),
}
_TERM = re.compile(r"([A-Za-z\u00b5\u03a9\u2126]{1,5})(?:\^?(-?[1-4]))?", re.ASCII)
_QUANTITY = re.compile(
    r"([-+\u2212]?[\d.,]{1,50}(?:[eE][-+]?\d{1,3}|\s?[x*\u00d7]\s?10\^\{?-?\d{1,3}\}?)?)\s*(.{0,40})"
)
_MAX_TERMS = 8


def unit(text: str) -> tuple[Fraction, Dimension] | None:
    """A unit's size in SI and its dimension: products, one division sign, powers up to 4."""
    text = text.strip().replace("\u00b7", "*").replace("\u00b2", "^2").replace("\u00b3", "^3")
    over, slash, under = text.partition("/")
    if "/" in under:
        return None
    factor, dimension = Fraction(1), [0] * 6
    for part, sign in ((over, 1), (under.strip("() "), -1)):
        terms = part.replace("*", " ").split()
        if len(terms) > _MAX_TERMS or (not terms and (sign == 1 or slash)):
            return None
        for term in terms:
            match = _TERM.fullmatch(term)
            named = _named(match[1]) if match else None
            if named is None:
                return None
            power = sign * int(match[2] or 1)
            factor *= named[0] ** power
            dimension = [a + power * b for a, b in zip(dimension, named[1])]
    return factor, tuple(dimension)


def _named(name: str) -> tuple[Fraction, Dimension] | None:
    if found := _PREFIXED.get(name) or _WHOLE.get(name):
        return found
    base = _PREFIXED.get(name[1:])
    power = _PREFIXES.get(name[0])
    return (base[0] * Fraction(10) ** power, base[1]) if base and power else None


def quantity(text: str | None) -> tuple[Fraction, Dimension] | None:
    """The SI value and dimension that a text such as 3.2 kN or 4e-3 m/s states."""
    match = _QUANTITY.fullmatch((text or "").strip().strip("$").rstrip("."))
    if match is None:
        return None
    digits = re.sub(r"\s?[x*\u00d7]\s?10\^\{?(-?\d+)\}?", r"e\1", match[1])
    value, size = number(digits), unit(match[2])
    return (value * size[0], size[1]) if value is not None and size else None
