"""An argument's text becomes the value that its schema asks for, which any JSON writer takes."""

import json
import random

import pytest

from nemotron_jax.data.chat.events import CallArguments
from nemotron_jax.data.chat.parse import TurnParser
from nemotron_jax.data.chat.schemas import Schemas

DEFINITIONS = {
    "Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}},
    "Zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    "Limit": {"title": "Limit", "allOf": [{"type": "integer"}, {"minimum": 1}]},
    "Mode": {"enum": ["1", "2"], "title": "Mode"},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "boolean"}]},
    "Void": {"$ref": "#/$defs/Void"},
    "a/b": {"const": 7},
}
OPTIONAL = lambda schema: {"anyOf": [schema, {"type": "null"}], "default": None}
REFERENCE = lambda name: {"$ref": f"#/$defs/{name}"}


def read(schema, text: str, **more):
    parameters = {"properties": {"x": schema}, "$defs": DEFINITIONS, **more}
    return Schemas([{"function": {"name": "f", "parameters": parameters}}]).value("f", "x", text)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (REFERENCE("Node"), '{"next":null}', {"next": None}),
        (OPTIONAL(REFERENCE("Node")), '{"a":1}', {"a": 1}),
        (OPTIONAL(REFERENCE("Zip")), "12345", "12345"),
        (OPTIONAL(REFERENCE("Zip")), "null", None),
        ({"allOf": [REFERENCE("Zip")], "description": "d"}, "null", "null"),
        (REFERENCE("Limit"), "10", 10),
        (REFERENCE("Limit"), "ten", "ten"),
        (REFERENCE("Mode"), "2", "2"),
        (REFERENCE("Loop"), "true", True),
        (REFERENCE("Loop"), "1", "1"),
        (REFERENCE("Void"), "1", 1),
        (REFERENCE("a~1b"), "7", 7),
        (REFERENCE("absent"), "1", 1),
        ({"$ref": "other.json#/a"}, "true", "true"),
        ({"$ref": "#/$defs/Own", "$defs": {"Own": {"type": "string"}}}, "1", "1"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": ["yes", True, None]}, "True", True),
        ({"const": "5"}, "5", "5"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "5", "5"),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "number"]}, "2.50", "2.50"),
        ({"type": ["string", "number"]}, "2.5", 2.5),
        ({"oneOf": [{"type": "string"}, {}]}, '{"a":1}', '{"a":1}'),
        ({"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "{}", {}),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "integer"}, "1e300", "1e300"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "int"}, "5", 5),
        ({"type": "float"}, "5", 5),
        ({"type": "bool"}, "False", False),
        ({"type": "Dict[str, int]"}, '{"a":1}', {"a": 1}),
        ({"type": "list"}, "[1,2]", [1, 2]),
        ({"type": "str"}, "5", "5"),
        ({"type": "any"}, "5", 5),
        ({"properties": {"a": {}}}, '{"a":1}', {"a": 1}),
        ({"items": {}}, "[1,2]", [1, 2]),
        ({"pattern": "^[0-9]+$"}, "5", "5"),
    ],
)
def test_a_type_is_found_wherever_the_schema_says_it(schema, text: str, value) -> None:
    found = read(schema, text)
    assert found == value and type(found) is type(value)


def test_the_parameters_themselves_may_stand_behind_references() -> None:
    inner = {"type": "object", "properties": {"zip": {"type": "string"}}}
    for parameters in (
        {"$ref": "#/definitions/Args", "definitions": {"Args": inner}},
        {"allOf": [{"$ref": "#/$defs/Args"}], "$defs": {"Args": inner}},
        {"additionalProperties": {"type": "string"}},
    ):
        assert Schemas([{"name": "f", "parameters": parameters}]).is_text("f", "zip")


def test_schemas_that_never_end_are_read_in_bounded_time() -> None:
    wide = {str(n): {"anyOf": [REFERENCE(str(n + 1))] * 9} for n in range(40)}
    deep: dict = {"type": "integer"}
    for _ in range(5000):
        deep = {"allOf": [deep]}
    for schema in (REFERENCE("0"), deep):
        assert read(schema, "1", **{"$defs": wide}) == 1
    assert Schemas([{"name": "f", "parameters": deep}]).value("f", "x", "1") == 1


NOT_JSON = ["NaN", "-Infinity", "1e999", "-1e400", "9" * 5000, "[" * 10**5, '["\\ud83d"]']
NOT_JSON += ['{"a": [Infinity]}', "[1e999]", f"[{'9' * 5000}]", '{"\\udc00": 1}', '"\\ud83d"']
NOT_JSON += ["[" * 40 + "]" * 40, "\ud83d", "{'a': 1}", "+5", "0x10", "1_000", ""]


@pytest.mark.parametrize("kind", [None, "number", "integer", "object", "array", "boolean"])
def test_what_is_not_json_stays_text(kind: str | None) -> None:
    for text in NOT_JSON:
        assert read({"type": kind} if kind else {}, text) == text


def test_whatever_is_written_leaves_the_parser_as_strict_json_in_utf8() -> None:
    draw = random.Random(0)
    schemas = [{}, *({"type": kind} for kind in ("string", "number", "integer", "object", "array"))]
    names = [f"p{n}" for n in range(len(schemas))]
    tools = [{"name": "f", "parameters": {"properties": dict(zip(names, schemas, strict=True))}}]
    bits = [
        *(text for text in NOT_JSON if len(text) < 99),
        "9" * 5000,
        "1",
        "[",
        "]",
        "{",
        "}",
        '"',
        ":",
        ",",
        "\\u",
        "d83d",
        "é",
        "\n",
        "null",
    ]
    for _ in range(300):
        written = "".join(
            f"<parameter={name}>\n{text}\n</parameter>\n"
            for name in draw.sample(names, 3)
            for text in ["".join(draw.choices(bits, k=draw.randint(0, 4)))]
        )
        parser = TurnParser(tools=tools)
        events = parser.push(f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>")
        text = "".join(event.text for event in events if isinstance(event, CallArguments))
        arguments = events[-1].arguments
        assert json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
        assert json.loads(text, parse_constant=lambda name: 1 / 0) == arguments
