"""Fields of a request's body, read one by one: a wrong value is refused by the field's name."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from nemotron_jax.config.checks import is_finite, is_integer
from nemotron_jax.config.untrusted import parse_json, shown
from nemotron_jax.environments.sound import sound_value
from nemotron_jax.serving.refusal import Refusal

# Of a body: lists and objects, names, and values in all. Nobody else runs while they are made: so
# many take up to half a second. A prompt of a million ids has as many values, in one list.
MOST_PARTS, MOST_NAMES, MOST_VALUES = 100_000, 200_000, 2_000_000


class Fields:
    """The object that a body holds. Null is as if absent; what nobody reads is ignored, as clients
    send fields of many servers."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    @classmethod
    def of(cls, body: bytes) -> "Fields":
        """Raises Refusal for what is no JSON object, or one nested beyond any use."""
        try:
            check_parts(body)
            values = sound_value(parse_json(body))
        except ValueError as error:
            raise Refusal(f"the body is not JSON: {str(error)[:200]}") from None
        if not isinstance(values, dict):
            raise Refusal(f"the body must be a JSON object, not {shown(values)[:100]}")
        return cls(values)

    def get(self, name: str) -> Any:
        """The value as it came; None without one."""
        return self._values.get(name)

    def refuse(self, name: str, rule: str) -> Refusal:
        """The refusal of a field's value."""
        name = self._prefix + name
        value = shown(self._values.get(name.removeprefix(self._prefix)))
        return Refusal(f"{name}={value[:100]}: {rule}", name)

    def integer(self, name: str, default: Any, least: int, most: int) -> Any:
        """An integer within bounds."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not is_integer(value) or not least <= value <= most:
            raise self.refuse(name, f"must be an integer from {least} to {most}")
        return int(value)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A finite number within bounds."""
        value = self.get(name)
        if value is None:
            return default
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not is_finite(value) or not least <= value <= most:
            raise self.refuse(name, f"must be a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return default if value is None else value

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, "must be a string")
        return default if value is None else value

    def part(self, name: str) -> "Fields":
        """The object of a field; an empty one without it."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, "must be an object")
        return Fields(value or {}, f"{self._prefix}{name}.")

    def values(self) -> dict[str, Any]:
        """All of it that is not null."""
        return {name: value for name, value in self._values.items() if value is not None}

    def objects(self, name: str, most: int) -> list[dict[str, Any]]:
        """A list of objects; an empty one without it."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.refuse(name, "must be a list of objects")
        if len(value) > most:
            raise self.refuse(name, f"must be at most {most} of them")
        return value

    def token_ids(self, name: str, vocabulary: int) -> list[int] | None:
        """A list of the model's token ids; None without it."""
        value = self.get(name)
        if value is not None and not is_token_ids(value, vocabulary):
            raise self.refuse(name, f"must be a list of token ids from 0 to {vocabulary - 1}")
        return value


def is_token_ids(value: Any, vocabulary: int) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and all(
        type(token) is int and 0 <= token < vocabulary for token in value
    )


def characters(value: Any, without: Collection[str] = ()) -> int:
    """How many a value's texts and names have, without those of some names."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping):
            total += sum(map(len, one))
            left += [inner for name, inner in one.items() if name not in without]
        elif isinstance(one, list | tuple):
            left += one
        else:
            total += 1  # a number takes a character at least
    return total


def check_parts(body: bytes) -> None:
    """Raise ValueError for JSON of too many parts, which would take seconds to be parsed."""
    bounds = (
        ("lists and objects", b"[{", MOST_PARTS),
        ("names", b":", MOST_NAMES),
        ("values", b",", MOST_VALUES),
    )
    if all(sum(body.count(bytes([sign])) for sign in signs) <= most for _, signs, most in bounds):
        return
    # Signs may stand in texts too: these are told by their quotes, of which escaped ones are none.
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = np.frombuffer(bare, np.uint8)
    outside = marks[~np.logical_xor.accumulate(marks == ord('"'))]
    for what, signs, most in bounds:
        found = sum(int(np.count_nonzero(outside == sign)) for sign in signs)
        if found > most:
            raise ValueError(f"it has {found} {what}, and may have {most}")
