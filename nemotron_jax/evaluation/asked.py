"""The text of --suites: NAME:KEY=VALUE:KEY=VALUE,NAME,…"""

import ast
import dataclasses
import re
from typing import Any

_OPEN, _CLOSE = "([{", ")]}"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_WORD = re.compile(r"[\w./@+-]+(?:[ ][\w./@+-]+)*")
MOST_CHARACTERS, MOST_DEEP = 20_000, 8  # far above any use, and below where a parser gives up
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A suite by name, and its options as they were written."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def parse(text: str) -> list[Asked]:
    """The suites that a text asks for, in its order.

    A value is a Python literal or a bare word; brackets hold literals and bare words, commas
    included, as in `ruler:kinds=(niah_single_1,vt):samples=20`. Raises ValueError for anything
    else.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"--suites: {len(text):,} characters; at most {MOST_CHARACTERS:,} are read"
        )
    items = [item.strip() for item in _split(text, ",", text)]
    if not any(items):
        raise ValueError("--suites=: names none; name some, or all")
    return [_item(item, text) for item in items]


def _item(item: str, text: str) -> Asked:
    name, *given = _split(item, ":", text)
    name = name.strip()
    if not _NAME.fullmatch(name):
        raise ValueError(f"--suites={_short(text)}: {name!r} is not the name of a suite")
    options: dict[str, Any] = {}
    for part in given:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not _NAME.fullmatch(key):
            raise ValueError(
                f"--suites={_short(text)}: {part!r} of {name} is not KEY=VALUE, as in samples=20"
            )
        if key in options:
            raise ValueError(f"--suites={_short(text)}: {name} has {key} twice; give it once")
        options[key] = _value(value.strip(), f"{name}:{key}")
    return Asked(name, options)


def _value(value: str, where: str) -> Any:
    """A literal, a bare word, or brackets of such."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        pass
    if value[:1] == "(" and value[-1:] == ")" or value[:1] == "[" and value[-1:] == "]":
        parts = [part.strip() for part in _split(value[1:-1], ",", value)]
        if parts and not parts[-1]:  # (a,)
            parts.pop()
        return tuple(_value(part, where) for part in parts)
    if not _WORD.fullmatch(value):
        raise ValueError(f"--suites: {where}={_short(value)!r} is neither a literal nor a word")
    return value


def _split(text: str, separator: str, whole: str) -> list[str]:
    """The text at separators outside of brackets and quotes."""
    parts, start, closing, quote = [], 0, [], ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in _OPEN:
            closing.append(_CLOSE[_OPEN.index(sign)])
            if len(closing) > MOST_DEEP:
                raise ValueError(f"--suites={_short(whole)}: brackets are nested too deep")
        elif sign in _CLOSE:
            if not closing or closing.pop() != sign:
                raise ValueError(f"--suites={_short(whole)}: {sign!r} closes nothing")
        elif sign == separator and not closing:
            parts.append(text[start:place])
            start = place + 1
    if closing or quote:
        raise ValueError(f"--suites={_short(whole)}: {quote or closing[-1]!r} is missing")
    return [*parts, text[start:]]


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
