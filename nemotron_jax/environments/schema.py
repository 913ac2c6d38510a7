"""Tool specifications as JSON Schema, the check of a call's arguments, and JSON read safely.

The subset of JSON Schema is what tools need: type, enum, const, properties, required,
additionalProperties (false, true or a schema), items, minItems, maxItems, uniqueItems, minimum,
maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, minLength, maxLength. One rule is stricter
than the standard: 3.0 is not an integer. Elsewhere numbers are compared by value: 1.0 is 1.
"""

import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

_TYPES = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
_ANNOTATIONS = {"description", "title", "default", "examples", "$schema"}


def _is_size(value: Any) -> bool:
    return _TYPES["integer"](value) and value >= 0


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


# Rule -> whether a value can stand behind it, and what should. Inner schemas are checked apart.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (lambda value: isinstance(value, str) or _is_name_list(value), "a name or a list"),
    "enum": (lambda value: isinstance(value, list | tuple) and len(value) > 0, "a list of values"),
    "const": (lambda value: True, "a value"),
    "properties": (_TYPES["object"], "an object"),
    "required": (_is_name_list, "a list of names"),
    "additionalProperties": (lambda value: isinstance(value, bool | dict), "a boolean or a schema"),
    "items": (_TYPES["object"], "a schema"),
    "uniqueItems": (_TYPES["boolean"], "a boolean"),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength"), (_is_size, "an integer of 0 or more")
    ),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        (_TYPES["number"], "a number"),
    ),
    "multipleOf": (lambda value: _TYPES["number"](value) and value > 0, "a number above 0"),
}
# What a model may nest, and how many values one call may hold: far above any tool's need, far
# below what makes a recursive reader fail.
MAX_DEPTH, MAX_VALUES = 32, 20_000
_BRACKET = re.compile(r'[\[\]{}"\\]')


def tool(
    name: str,
    description: str,
    properties: dict[str, dict] | None = None,
    *,
    optional: tuple[str, ...] = (),
) -> dict:
    """A tool's specification in the form chat templates read; all but `optional` is required."""
    properties = properties or {}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [key for key in properties if key not in optional],
        "additionalProperties": False,
    }
    check_schema(parameters, name)
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def check_schema(schema: Any, where: str = "schema") -> None:
    """Raise ValueError where a schema uses what `faults` does not understand."""
    if not isinstance(schema, dict):
        raise ValueError(f"{where}: {schema!r} is not a schema; write a JSON object")
    if unknown := sorted(set(schema) - set(_RULES) - _ANNOTATIONS):
        raise ValueError(f"{where}: {unknown} is not supported; use some of {sorted(_RULES)}")
    for rule, (fits, words) in _RULES.items():
        if rule in schema and not fits(schema[rule]):
            raise ValueError(f"{where}: {rule} is {_shown(schema[rule])}; write {words}")
    types = schema.get("type", [])
    for kind in [types] if isinstance(types, str) else types:
        if kind not in _TYPES:
            raise ValueError(f"{where}: type {kind!r} is unknown; use one of {sorted(_TYPES)}")
    for key, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{where}.{key}")
    if "items" in schema:
        check_schema(schema["items"], f"{where}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        check_schema(schema["additionalProperties"], f"{where}.*")


def faults(value: Any, schema: dict, where: str = "") -> list[str]:
    """What is wrong with a value, as sentences for a model; none when it fits the schema.

    Raises nothing, whatever the value; one deeper or larger than a call may be is one fault.
    """
    if too_large(value):
        return [f"more than {MAX_VALUES} values or {MAX_DEPTH} levels deep"]
    return list(_faults(value, schema, where))


def _faults(value: Any, schema: dict, where: str) -> Iterator[str]:
    at = f"{where}: " if where else ""
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[kind](value) for kind in types):
        yield f"{at}{_shown(value)} is not of type {' or '.join(types)}"
        return
    if "enum" in schema and not any(equal(value, choice) for choice in schema["enum"]):
        yield f"{at}{_shown(value)} is not one of {json.dumps(schema['enum'])}"
    if "const" in schema and not equal(value, schema["const"]):
        yield f"{at}{_shown(value)} is not {json.dumps(schema['const'])}"
    if isinstance(value, str):
        yield from _size_faults(len(value), schema, "Length", f"{at}a text of", "characters")
    elif isinstance(value, list):
        yield from _size_faults(len(value), schema, "Items", f"{at}a list of", "items")
        if schema.get("uniqueItems") and not _all_distinct(value):
            yield f"{at}items occur twice"
        if "items" in schema:
            for place, item in enumerate(value):
                yield from _faults(item, schema["items"], f"{where}[{place}]")
    elif isinstance(value, dict):
        yield from _object_faults(value, schema, where)
    elif _TYPES["number"](value):
        for rule, (keeps, words) in _BOUNDS.items():
            if rule in schema and not keeps(value, schema[rule]):
                yield f"{at}{_shown(value)} is {words} {schema[rule]}"


def _is_multiple(value: float, step: float) -> bool:
    """By the decimals as they are written: 0.3 is a multiple of 0.1."""
    try:
        over, under = (n if isinstance(n, int) else Fraction(repr(n)) for n in (value, step))
    except ValueError:  # an infinity
        return False
    return Fraction(over) % under == 0


_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "less than"),
    "maximum": (lambda value, bound: value <= bound, "more than"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "not above"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "not below"),
    "multipleOf": (_is_multiple, "not a multiple of"),
}


def _all_distinct(items: list) -> bool:
    """Whether no two items are equal as JSON; what is no JSON counts as twice there."""
    try:
        return len({canonical(_by_value(item)) for item in items}) == len(items)
    except (TypeError, ValueError):
        return False


def _by_value(value: Any) -> Any:
    """A value with its whole numbers as integers, so that 1.0 and 1 are written alike."""
    if isinstance(value, dict):
        return {key: _by_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_value(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _size_faults(size: int, schema: dict, rule: str, what: str, unit: str) -> Iterator[str]:
    if size < schema.get(f"min{rule}", 0):
        yield f"{what} {size} {unit} is shorter than {schema[f'min{rule}']}"
    if size > schema.get(f"max{rule}", size):
        yield f"{what} {size} {unit} is longer than {schema[f'max{rule}']}"


def _object_faults(value: dict, schema: dict, where: str) -> Iterator[str]:
    at = f"{where}: " if where else ""
    properties = schema.get("properties", {})
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{at}{key!r} is missing"
    others = schema.get("additionalProperties", True)
    for key, item in value.items():
        inner = properties.get(key, others)
        if inner is False:
            yield f"{at}{_shown(key)} is unknown; the names are {sorted(properties)}"
        elif inner is not True:
            name = key if isinstance(key, str) else _shown(key)
            yield from _faults(item, inner, f"{where}.{name}" if where else name)


def example(schema: dict) -> Any:
    """A value that fits a schema of the supported subset, but for two cases.

    These are uniqueItems beyond one item, and bounds that no round number lies between.
    """
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "array":
        return [example(schema.get("items", {}))] * schema.get("minItems", 1)
    if kind == "object":
        known = {key: example(inner) for key, inner in schema.get("properties", {}).items()}
        others = schema.get("additionalProperties", True)
        inner = others if isinstance(others, dict) else {}
        return known | {
            key: example(inner) for key in schema.get("required", ()) if key not in known
        }
    if kind == "string":
        return "a" * max(1, schema.get("minLength", 1))
    return {"boolean": True, "null": None}[kind] if kind in ("boolean", "null") else _number(schema)


def _number(schema: dict) -> int | float:
    """A number within a schema's bounds, a multiple of what it names."""
    step = schema.get("multipleOf", 1)
    if "minimum" in schema or "exclusiveMinimum" in schema:
        above = schema.get("exclusiveMinimum", schema.get("minimum"))
        number = max(above, schema.get("minimum", above))
        number = number if "multipleOf" not in schema else -(-number // step) * step
        return number if number > schema.get("exclusiveMinimum", number - 1) else number + step
    if "maximum" in schema or "exclusiveMaximum" in schema:
        below = schema.get("exclusiveMaximum", schema.get("maximum"))
        number = min(below, schema.get("maximum", below))
        number = number if "multipleOf" not in schema else number // step * step
        return number if number < schema.get("exclusiveMaximum", number + 1) else number - step
    return step


def too_large(value: Any) -> bool:
    """Whether a value is nested deeper or holds more than a call may; never recurses."""
    level, seen = [value], 0
    for _ in range(MAX_DEPTH):
        inner: list = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
        seen += len(inner)
        if not inner:
            return False
        if seen > MAX_VALUES:
            return True
        level = inner
    return True


def read_json(text: str) -> Any:
    """The value of a JSON text; ValueError for anything else, NaN and repeated keys included."""
    if (deepest := _depth(text)) > MAX_DEPTH:
        raise ValueError(f"JSON nested {deepest} deep; at most {MAX_DEPTH} is read")
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def _depth(text: str) -> int:
    """How deep the brackets of a JSON text nest, those in its strings aside."""
    depth = deepest = 0
    quoted, skipped = False, -1
    for match in _BRACKET.finditer(text):
        character = match[0]
        if match.start() == skipped:
            continue
        if character == "\\":
            skipped = match.end()  # an escaped quote ends no string
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if character in "[{" else -1
            deepest = max(deepest, depth)
    return deepest


def canonical(value: Any) -> str:
    """One text for a JSON value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: unlike Python's, true is not 1; 1.0 is 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def same_arguments(given: object, wanted: object) -> bool:
    """Equality of arguments, in which texts may differ in case and outer spaces."""
    if isinstance(given, str) and isinstance(wanted, str):
        return " ".join(given.casefold().split()) == " ".join(wanted.casefold().split())
    if isinstance(given, dict) and isinstance(wanted, dict):
        same_keys = given.keys() == wanted.keys()
        return same_keys and all(same_arguments(given[key], wanted[key]) for key in wanted)
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(same_arguments, given, wanted))
    return equal(given, wanted)


def _shown(value: Any) -> str:
    try:
        huge = isinstance(value, int) and abs(value) >= 10**40
        text = "a huge number" if huge else repr(value)
    except (ValueError, RecursionError):  # of a huge number within, or of what nests deep
        text = "a huge value"
    return text if len(text) <= 60 else text[:57] + "..."


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("JSON object with a repeated key")
    return keys
