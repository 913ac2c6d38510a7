"""Random JSON schemas, bounded or not, within what `environments.schema.faults` checks."""

import random
from typing import Any

NAMES = ("name", "kind", "größe", "a b", "x_1", "size", "on", "list", "Id")


def schema(draw: random.Random, depth: int = 2, *, bounded: bool = True) -> dict[str, Any]:
    """A schema of any type; objects and arrays up to `depth` levels."""
    kinds = [_text, _number, _integer, _listed, _flag] + [_object, _array] * 2 * (depth > 0)
    return draw.choice(kinds)(draw, depth - 1, bounded)


def parameters(draw: random.Random, *, bounded: bool = True) -> dict[str, Any]:
    """The parameters of a tool."""
    return _object(draw, 1, bounded)


def tool(draw: random.Random, name: str, *, bounded: bool = True, **more: Any) -> dict[str, Any]:
    """A tool with random parameters."""
    function = {"name": name, "parameters": parameters(draw, bounded=bounded), **more}
    return {"type": "function", "function": function}


def _text(draw: random.Random, _: int, bounded: bool) -> dict[str, Any]:
    if draw.random() < 0.2 and bounded:
        return {"type": "string", "pattern": "^[a-d/]{1,4}(x|yé)?$"}
    least = draw.randint(0, 3)
    most = {"maxLength": least + draw.randint(0, 6)} if bounded else {}
    return {"type": "string", "minLength": least, **most}


def _number(draw: random.Random, _: int, bounded: bool) -> dict[str, Any]:
    # An untrained model draws digits by chance: ten of them soon end.
    least = draw.randint(-9, 9)
    return {"type": "number"} | (
        {"minimum": least, "maximum": least + draw.randint(1, 99)} if bounded else {}
    )


def _integer(draw: random.Random, _: int, bounded: bool) -> dict[str, Any]:
    least = draw.randint(-1000, 1000)
    return {"type": "integer", "minimum": least} | (
        {"maximum": least + draw.randint(0, 2000)} if bounded else {}
    )


def _listed(draw: random.Random, _: int, bounded: bool) -> dict[str, Any]:
    values = ["a", "b<|im_end|>", "</tool_call>", 3, True, None, "3", "é"]
    return {"enum": draw.sample(values, draw.randint(3, 6))}


def _flag(draw: random.Random, _: int, bounded: bool) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def _array(draw: random.Random, depth: int, bounded: bool) -> dict[str, Any]:
    most = {"maxItems": draw.randint(1, 3)} if bounded else {}
    return {"type": "array", "items": schema(draw, depth, bounded=bounded), **most}


def _object(draw: random.Random, depth: int, bounded: bool) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: schema(draw, depth, bounded=bounded) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
        **({"additionalProperties": False} if bounded else {}),
    }
