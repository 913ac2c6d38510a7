"""Whether an answer says what is expected, in whatever form it is written."""

import re

from nemotron_jax.environments.answers import MAX_ANSWER, bare, literal, plain, value_of
from nemotron_jax.environments.expressions import NAMES, same_function
from nemotron_jax.environments.second_opinion import agrees
from nemotron_jax.environments.units import quantity, unit

# Elements of a list beyond this are not compared one by one, nor lists within deeper lists.
MAX_ITEMS, MAX_NESTING = 60, 6
_LOOSE = re.compile(r"\s*([^\w\s.])\s*")
_GAP = re.compile(r"(?<!\d) | (?!\d)")
_OPEN, _CLOSE = "([{<", ")]}>"
_JOINT = re.compile(r"\s*(?:,|;|\bor\b|\band\b)\s*(?:(?:or|and)\b\s*)?")
_MEMBER = re.compile(r"^[A-Za-z] in (?=[^A-Za-z])")
_EQUALITY = re.compile(r"(?<![<>!=])=(?!=)")
_WORDED = re.compile(
    r"([-+$€£¥]{0,2}\s?[\d.][\d.,/ ]{0,60}?(?:[eE][-+]?\d{1,3})?)(\s*)([A-Za-z°%].{0,60})"
)
_UNIT_BEHIND = re.compile(
    r"(.{0,400}(?:\bpi|[\d)])) "
    r"((?:[A-Za-z]{2,16} ){0,2}[A-Za-z]{2,16}(?:\^[23])?(?:/[A-Za-z^2]{1,9})?)"
)
_WORDS = re.compile(r"[A-Za-z]{2,20}(?:[ \-/][A-Za-z]{2,20}){0,4}(?:\^[23])?")
# Words behind a number that change it, or that are no unit of what is counted.
_NO_UNITS = frozenset(
    "or and not but to than times plus minus more less sqrt pi hundred thousand million billion"
    " trillion dozen half inf sin cos tan log ln mod percent pct most least about is are was were"
    " squared cubed factorial choose over divided multiplied by point modulo base root wrong too"
    " pairs twice squares cubes".split()
)


def same_answer(expected: str, given: str | None) -> bool:
    """Whether an answer is the expected one: by its text, its value, its unit, or as mathematics.

    Where the comparison here says no, math-verify is asked, if it is installed.
    """
    if not given or max(len(expected), len(given)) > MAX_ANSWER or not plain(bare(expected)):
        return False
    if _same(bare(expected), bare(given), 0):
        return True
    return _needs_opinion(bare(expected), bare(given)) and agrees(expected, given)


def _needs_opinion(expected: str, given: str) -> bool:
    """Whether two different texts may be the same mathematics.

    Words are not, nor a number and a sum to be worked out, nor a root and its rounded decimal, nor
    lists of different lengths.
    """
    numbers = _number(expected) is not None, _number(given) is not None
    if all(numbers) or (numbers[0] and not re.search(r"[A-Za-z]", given)):
        return False
    if (numbers[1] and "." in given) or not all(map(_is_mathematics, (expected, given))):
        return False
    lengths = [len(items[1]) if items else 1 for items in map(_items, (expected, given))]
    return lengths[0] == lengths[1]


def _is_mathematics(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{4,}|\b(?:or|and|not)\b", text)
    return bool(re.search(r"[\d+*/^=<>|(]", text)) and NAMES.issuperset(words)


def _same(expected: str, given: str, depth: int) -> bool:
    expected, given = (_MEMBER.sub("", text, count=1) for text in (expected, given))
    if _loose(expected) == _loose(given):
        return bool(_loose(given))
    if given.count("=") > 1:
        given = value_of(given)
    if ("=" in expected) != ("=" in given):
        expected, given = value_of(expected), value_of(given)
    if (value := _number(expected)) is not None or _number(given) is not None:
        other = _number(given)
        if value is not None and other is not None:
            return _equal_numbers(expected, given)
        # A power or a root may be expected, and its number given; not the other way round.
        return _equal_quantities(expected, given) or (
            value is None and _equal_expressions(expected, given)
        )
    if _equal_quantities(expected, given):
        return True
    bodies = [_without_unit(text) for text in (expected, given)]
    if bodies[0][1] != bodies[1][1] and not all(words for _, words in bodies):
        return _same(bodies[0][0], bodies[1][0], depth)
    one, other = _items(expected), _items(given)
    if (one or other) and depth < MAX_NESTING:
        return _equal_items(one or ("", [expected]), other or ("", [given]), depth + 1)
    return _equal_expressions(expected, given)


def _loose(text: str) -> str:
    """A text without case, and without spaces around what is no letter, digit or point."""
    text = _LOOSE.sub(r"\1", plain(text))
    return text if re.search(r"[a-z]{2}", text) else _GAP.sub("", text)


def _number(text: str):
    return literal(text.removesuffix("°").strip())


def _equal_numbers(expected: str, given: str) -> bool:
    """Equality of value; a percent sign that one of the two lacks may be understood."""
    one, other = _number(expected), _number(given)
    if one == other:
        return True
    signs = [bool(re.search(r"%$|percent$|pct$", text.casefold())) for text in (expected, given)]
    if signs[0] == signs[1]:
        return False
    return one * 100 == other if signs[0] else one == other * 100


def _equal_quantities(expected: str, given: str) -> bool:
    """Equality of numbers with units. A unit that one of the two lacks is understood."""
    one, other = quantity(expected), quantity(given)
    if one and other:
        return one == other
    parts = [_worded(text) for text in (expected, given)]
    if None in parts:
        return False
    (first, words), (second, others) = parts
    same_words = plain(words).removesuffix("s") == plain(others).removesuffix("s")
    return first == second and (same_words or not words or not others)


def _worded(text: str):
    """A number and the words of its unit; None for another text. 18x is no number of x."""
    if (value := _number(text)) is not None:
        return value, "" if not text.endswith("%") else "%"
    match = _WORDED.fullmatch(text)
    value = _number(match[1].strip()) if match else None
    if value is None:
        return None
    words = match[3].strip()
    if unit(words) and (match[2] or len(words) > 1):
        return value, words
    tokens = set(re.split(r"[ \-/^]", words.casefold()))
    known = match[2] and _WORDS.fullmatch(words) and not tokens & _NO_UNITS
    return (value, words) if known else None


def _without_unit(text: str) -> tuple[str, str]:
    """A value that is no plain number, such as 16 pi, and the unit behind it, or ""."""
    match = _UNIT_BEHIND.fullmatch(text)
    known = match and (match[2].endswith(("unit", "units")) or unit(match[2]))
    if known and _worded(text) is None:
        return match[1], match[2]
    return text, ""


def _items(text: str) -> tuple[str, list[str]] | None:
    """The brackets of a list, "" for none, and its elements; None for what is no list."""
    text = text.strip()
    brackets = ""
    if text.count("\u00b1") == 1 and "," not in text:  # both signs
        head, _, tail = text.partition("\u00b1")
        plus = f"{head}+{tail}" if head.strip(" =x") else head + tail.strip()
        text = f"{plus}, {head}-{tail.strip()}"
    if text[:1] in tuple(_OPEN) and text[-1:] in tuple(_CLOSE) and _spans(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
        text = inner
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        joint = _JOINT.match(text, place) if not depth else None
        if joint and joint.end() > place and joint[0].strip():
            parts.append(text[start:place])
            start = place = joint.end()
        else:
            place += 1
    parts = [part.strip() for part in (*parts, text[start:])]
    if depth or not all(parts) or len(parts) > MAX_ITEMS:
        return None
    return (brackets, parts) if len(parts) > 1 or brackets in ("{}", "[]") else None


def _spans(text: str) -> bool:
    """Whether the first bracket closes with the last one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{<") - (character in ")]}>")
        if depth <= 0:
            return place == len(text) - 1
    return False


def _equal_items(one: tuple[str, list[str]], other: tuple[str, list[str]], depth: int) -> bool:
    """Equality of lists: those in braces or without brackets in any order."""
    (brackets, wanted), (others, found) = one, other
    if brackets and others and brackets != others:
        return False
    wanted, found = ([_side(item, items) for item in items] for items in (wanted, found))
    if len(wanted) != len(found):
        return False
    if {brackets, others} <= {"", "{}"}:
        left = list(found)
        for item in wanted:
            match = next((place for place, o in enumerate(left) if _same(item, o, depth)), None)
            if match is None:
                return False
            left.pop(match)
        return True
    return all(_same(item, o, depth) for item, o in zip(wanted, found))


def _side(item: str, items: list[str]) -> str:
    """An element without "x =" where every element of its list has the same variable there."""
    sides = [_EQUALITY.split(one) for one in items]
    heads = {side[0].strip() for side in sides if len(side) == 2}
    whole = len(heads) == 1 and len(next(iter(heads))) == 1
    return _EQUALITY.split(item)[-1].strip() if whole else item


def _equal_expressions(expected: str, given: str) -> bool:
    sides = [_EQUALITY.split(text) for text in (expected, given)]
    if any(len(side) > 2 for side in sides):
        return False
    if len(sides[0]) == len(sides[1]) == 2:  # equations: their differences agree, up to the sign
        one, other = (f"({left})-({right})" for left, right in sides)
        return same_function(one, other) or same_function(one, f"-({other})")
    named = [side[-1] if len(side) == 1 or _is_name(side[0]) else None for side in sides]
    if None in named or not re.search(r"[\d+*/^(!-]", named[0]):
        return False
    return same_function(*named)


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z](?:_\w)?(?:\([a-z]\))?", text.strip()))
