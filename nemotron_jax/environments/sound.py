"""Texts and values of models, tools and servers, made fit to be encoded and written as JSON."""

import math
import re
from typing import Any

# JSON's \ud83d and Python's chr(0xd83d) spell them: no character, and no encoder takes them.
_HALVES = re.compile("[\ud800-\udfff]")
# Levels of lists and objects that are kept. A session refuses a call at half of them, and what
# recurses into a value (copies, JSON, pickles) fails at several hundred.
_MAX_LEVELS = 64
# Bits of the largest integer: Python writes no number of more than 4,300 digits in decimals.
_MAX_BITS = 14_000


def sound_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair."""
    return _HALVES.sub("\ufffd", text)


def sound_value(value: Any) -> Any:
    """A value that any JSON writer takes, the same one where it is of JSON already.

    Halves of surrogate pairs become U+FFFD, what is nested too deep an ellipsis, and what JSON has
    no form for (NaN, numbers of thousands of digits, objects of other types) a text. Never raises.
    """
    return _sound(value, _MAX_LEVELS)


def _sound(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return sound_text(value)
    if isinstance(value, int):
        return value if value.bit_length() <= _MAX_BITS else f"{value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict | list | tuple) and levels == 0:
        return "…"
    if isinstance(value, dict):
        return {_key(key): _sound(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sound(item, levels - 1) for item in value]
    return _described(value)


def _key(key: Any) -> str:
    return sound_text(key) if isinstance(key, str) else str(_sound(key, 0))


def _described(value: Any) -> str:
    try:
        return sound_text(repr(value))
    except Exception:  # an object of somebody else's, whose repr may do anything
        return type(value).__name__
