"""Tool specifications as JSON Schema, the check of a call's arguments, and JSON read safely.

The subset of JSON Schema is what tools need: type, enum, const, properties, required,
additionalProperties (false or true), items, minItems, maxItems, uniqueItems, minimum, maximum,
minLength, maxLength. One rule is stricter than the standard: 3.0 is not an integer.
"""

import json
from collections.abc import Iterator
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
_RULES = {
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
    *("minItems", "maxItems", "uniqueItems", "minimum", "maximum", "minLength", "maxLength"),
}
# What a model may nest, and how many values one call may hold: far above any tool's need, far
# below what makes a recursive reader fail.
MAX_DEPTH, MAX_VALUES = 32, 20_000


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
    if unknown := sorted(set(schema) - _RULES - _ANNOTATIONS):
        raise ValueError(f"{where}: {unknown} is not supported; use some of {sorted(_RULES)}")
    types = schema.get("type", [])
    for kind in [types] if isinstance(types, str) else types:
        if kind not in _TYPES:
            raise ValueError(f"{where}: type {kind!r} is unknown; use one of {sorted(_TYPES)}")
    for key, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{where}.{key}")
    if "items" in schema:
        check_schema(schema["items"], f"{where}[]")


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
        if schema.get("uniqueItems") and len({canonical(item) for item in value}) < len(value):
            yield f"{at}items occur twice"
        if "items" in schema:
            for place, item in enumerate(value):
                yield from _faults(item, schema["items"], f"{where}[{place}]")
    elif isinstance(value, dict):
        yield from _object_faults(value, schema, where)
    elif _TYPES["number"](value):
        if "minimum" in schema and not value >= schema["minimum"]:
            yield f"{at}{_shown(value)} is less than {schema['minimum']}"
        if "maximum" in schema and not value <= schema["maximum"]:
            yield f"{at}{_shown(value)} is more than {schema['maximum']}"


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
    for key, item in value.items():
        if key in properties:
            yield from _faults(item, properties[key], f"{where}.{key}" if where else str(key))
        elif not schema.get("additionalProperties", True):
            yield f"{at}{_shown(key)} is unknown; the names are {sorted(properties)}"


def example(schema: dict) -> Any:
    """A value that fits a schema of the supported subset (uniqueItems beyond one item aside)."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "array":
        return [example(schema.get("items", {}))] * schema.get("minItems", 1)
    if kind == "object":
        return {key: example(inner) for key, inner in schema.get("properties", {}).items()}
    if kind == "string":
        return "a" * max(1, schema.get("minLength", 1))
    return {"boolean": True, "null": None}.get(
        kind, schema.get("minimum", schema.get("maximum", 1))
    )


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
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    if deepest > MAX_DEPTH:
        raise ValueError(f"JSON nested {deepest} deep; at most {MAX_DEPTH} is read")
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)


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


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("JSON object with a repeated key")
    return keys
