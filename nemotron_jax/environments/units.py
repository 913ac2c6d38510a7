"""Quantities: a number with a unit, exact, so that 0.5 kN equals 500 kg*m/s^2."""

import re
from fractions import Fraction

from nemotron_jax.environments.answers import MAX_ANSWER, bare, literal, value_of

# Exponents of metre, kilogram, second, ampere, kelvin, mole.
Dimension = tuple[int, int, int, int, int, int]
_PREFIXES = {"G": 9, "M": 6, "k": 3, "K": 3, "d": -1, "c": -2, "m": -3, "u": -6, "\u00b5": -6,
             "n": -9}  # fmt: skip
_PREFIX_WORDS = {"giga": 9, "mega": 6, "kilo": 3, "deci": -1, "centi": -2, "milli": -3,
                 "micro": -6, "nano": -9}  # fmt: skip
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
    "Wh": (Fraction(3600), (2, 1, -2, 0, 0, 0)),
    "Pa": (Fraction(1), (-1, 1, -2, 0, 0, 0)),
    "Hz": (Fraction(1), (0, 0, -1, 0, 0, 0)),
    "C": (Fraction(1), (0, 0, 1, 1, 0, 0)),
    "V": (Fraction(1), (2, 1, -3, -1, 0, 0)),
    "ohm": (Fraction(1), (2, 1, -3, -2, 0, 0)),
    "L": (Fraction(1, 1000), (3, 0, 0, 0, 0, 0)),
    "l": (Fraction(1, 1000), (3, 0, 0, 0, 0, 0)),
    "bar": (Fraction(100_000), (-1, 1, -2, 0, 0, 0)),
    "M": (Fraction(1000), (-3, 0, 0, 0, 0, 1)),
}
_WHOLE: dict[str, tuple[Fraction, Dimension]] = {
    "min": (Fraction(60), (0, 0, 1, 0, 0, 0)),
    "h": (Fraction(3600), (0, 0, 1, 0, 0, 0)),
    "t": (Fraction(1000), (0, 1, 0, 0, 0, 0)),
    "mps": (Fraction(1), (1, 0, -1, 0, 0, 0)),
    **dict.fromkeys(("kph", "kmh"), (Fraction(5, 18), (1, 0, -1, 0, 0, 0))),
}
# Names, without the s of the plural; a prefix may stand before those of the first line.
_NAMES = {
    "meter": "m", "metre": "m", "gram": "g", "gramme": "g", "second": "s", "sec": "s",
    "ampere": "A", "amp": "A", "kelvin": "K", "mole": "mol", "mol": "mol", "newton": "N",
    "joule": "J", "watt": "W", "pascal": "Pa", "hertz": "Hz", "coulomb": "C", "volt": "V",
    "ohm": "ohm", "liter": "L", "litre": "L", "watthour": "Wh", "minute": "min", "hour": "h",
    "hr": "h", "tonne": "t", "hz": "Hz", "pa": "Pa", "molar": "M",
}  # fmt: skip
_WORD_POWERS = {"square": 2, "squared": 2, "cubic": 3, "cubed": 3}
_TERM = re.compile(r"([A-Za-z\u00b5]{1,16})(?:\^?\(?(-?[1-4])\)?)?", re.ASCII)
# A number and what follows it; the number's own reading is `literal`.
_QUANTITY = re.compile(
    r"([-+]?(?:\d{1,3}(?:[ ,]\d{3})+(?!\d)|[\d.]{1,50})"
    r"(?: ?/ ?\d{1,40}(?![A-Za-z])| \d{1,40}/\d{1,40})?"
    r"(?:[eE][-+]?\d{1,3}|\s?[x*]\s?10\^\(?[+-]?\d{1,3}\)?)?)\s*(.{0,80})"
)
_MAX_TERMS = 8


def unit(text: str) -> tuple[Fraction, Dimension] | None:
    """A unit's size in SI and its dimension, in symbols or names, powers up to 4.

    All that stands behind a division sign, or behind "per", divides: kg/m s, m/s/s.
    """
    text = re.sub(r"\bper\b", "/", text.replace("[", "").replace("]", ""))
    text = re.sub(r"(?<=watt)[ -]hour", "hour", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(kilo-|mega-|[kMGu\u00b5] )(?=ohm)", lambda match: match[1][:-1], text)
    text = re.sub(r"(?<=[A-Za-z])[-.](?=[A-Za-z])", " ", text.replace("**", "^"))
    over, *under = text.replace("*", " ").split("/")
    factor, dimension = Fraction(1), [0] * 6
    for place, part in enumerate((over, *under)):
        terms = _powers(part.strip("() ").split())
        if terms is None or not 0 < len(terms) <= _MAX_TERMS:
            return None
        for name, power in terms:
            named = _named(name)
            if named is None:
                return None
            power = -power if place else power
            factor *= named[0] ** power
            dimension = [a + power * b for a, b in zip(dimension, named[1])]
    return (factor, tuple(dimension)) if len(under) <= _MAX_TERMS else None


def _powers(words: list[str]) -> list[tuple[str, int]] | None:
    """Each unit's name with its exponent; "square" stands before a name, "squared" behind."""
    terms: list[tuple[str, int]] = []
    before = 1
    for word in words:
        power = _WORD_POWERS.get(word.casefold())
        if power and word.casefold().endswith("d") and terms and terms[-1][1] == 1:
            terms[-1] = (terms[-1][0], power)
        elif power:
            before = power
        elif match := _TERM.fullmatch(word):
            terms.append((match[1], int(match[2] or before)))
            before = 1
        else:
            return None
    return terms if before == 1 else None


def _named(name: str) -> tuple[Fraction, Dimension] | None:
    if found := _PREFIXED.get(name) or _WHOLE.get(name):
        return found
    base, power = _PREFIXED.get(name[1:]), _PREFIXES.get(name[0])
    if base and power:
        return base[0] * Fraction(10) ** power, base[1]
    word = name.casefold()
    for spelt in (word, word.removesuffix("s")):
        if symbol := _NAMES.get(spelt):
            return _named(symbol)
        for prefix, power in _PREFIX_WORDS.items():
            if base := _PREFIXED.get(_NAMES.get(spelt.removeprefix(prefix), "")):
                return base[0] * Fraction(10) ** power, base[1]
    return None


def quantity(text: str | None) -> tuple[Fraction, Dimension] | None:
    """The SI value and dimension that a text such as 3.2 kN or 4e-3 m/s states."""
    if text is None or len(text) > MAX_ANSWER:
        return None
    match = _QUANTITY.fullmatch(value_of(bare(text)))
    if match is None:
        return None
    value, size = literal(match[1].strip()), unit(match[2])
    return (value * size[0], size[1]) if value is not None and size else None
