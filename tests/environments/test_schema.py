"""Arguments are judged as the standard says; reading JSON raises nothing but ValueError."""

import json

import pytest

from nemotron_jax.environments import Draws, tool
from nemotron_jax.environments.schema import (
    MAX_DEPTH,
    canonical,
    check_schema,
    equal,
    example,
    faults,
    read_json,
    too_large,
)


def random_value(draws: Draws, depth: int = 3) -> object:
    kind = draws.below(6 if depth else 4)
    if kind == 4:
        return [random_value(draws, depth - 1) for _ in range(draws.below(4))]
    if kind == 5:
        return {draws.choice("abc"): random_value(draws, depth - 1) for _ in range(draws.below(4))}
    return (None, draws.chance(1, 2), draws.between(-3, 3), draws.choice(["", "a", "ab"]))[kind]


def random_schema(draws: Draws, depth: int = 2) -> dict:
    kind = draws.choice(["string", "integer", "number", "boolean", "null", "array", "object"])
    schema: dict = {"type": [kind, "null"] if draws.chance(1, 5) else kind}
    if draws.chance(1, 5):
        return {"enum": [random_value(draws, 1) for _ in range(3)]}
    if kind == "string":
        schema |= {"minLength": draws.below(2), "maxLength": draws.between(1, 3)}
    if kind in ("integer", "number"):
        schema |= {"minimum": draws.between(-2, 0), "maximum": draws.between(0, 2)}
    if kind == "array":
        schema |= {"minItems": draws.below(2), "maxItems": draws.between(1, 3)}
        schema["uniqueItems"] = draws.chance(1, 2)
        if depth:
            schema["items"] = random_schema(draws, depth - 1)
    if kind == "object":
        schema["properties"] = (
            {key: random_schema(draws, depth - 1) for key in "ab"} if depth else {}
        )
        schema["required"] = [key for key in schema["properties"] if draws.chance(1, 2)]
        schema["additionalProperties"] = draws.chance(1, 2)
    return schema


def test_values_are_judged_as_jsonschema_judges_them() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    draws, verdicts = Draws("schema"), []
    for _ in range(400):
        schema, value = random_schema(draws), random_value(draws)
        check_schema(schema)
        right = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert (not faults(value, schema)) == right, (schema, value)
        verdicts.append(right)
    assert 40 < sum(verdicts) < 360


NUMBERS = (0, 1, 1.0, 0.5, 0.3, -2, -2.5, 7, 1e300, 10**25, float("inf"))


def test_numbers_are_judged_by_value_as_jsonschema_judges_them() -> None:
    """Bounds, steps, sameness of 1 and 1.0, and objects whose other keys have a schema."""
    jsonschema = pytest.importorskip("jsonschema")
    rules = [{"minimum": 0.5}, {"maximum": 1}, {"exclusiveMinimum": 1}, {"exclusiveMaximum": 0.3}]
    rules += [{"multipleOf": 2}, {"enum": [1, 0.3, True]}, {"const": 7.0}, {"const": False}]
    pairs = [(value, rule) for rule in rules for value in (*NUMBERS[:-1], True, False, "1", None)]
    others = ({"type": "integer"}, {}, True, False, {"additionalProperties": {"enum": [1]}})
    objects = ({"a": "x"}, {"b": 1}, {"b": "x"}, {"b": None, "c": {"d": 1.0}}, {"c": {"d": 2}})
    for inner in others:
        schema = {"properties": {"a": {"type": "string"}}, "additionalProperties": inner}
        pairs += [(value, schema) for value in objects]
    lists = ([1, 1.0], [1, True], [{"a": 1}, {"a": 1.0}], [[0], [False]], [0, -0.0], ["1", 1])
    pairs += [(value, {"uniqueItems": True}) for value in lists]
    for value, schema in pairs:
        check_schema(schema)
        right = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert (not faults(value, schema)) == right, (schema, value)
    assert not faults(0.3, {"multipleOf": 0.1}) and faults(0.35, {"multipleOf": 0.1})
    assert faults(float("inf"), {"multipleOf": 2}) and faults(float("nan"), {"minimum": 0})


@pytest.mark.parametrize(
    "schema",
    [{"minimum": "3"}, {"maxItems": -1}, {"minLength": "a"}, {"required": "a"}, {"enum": []},
     {"properties": []}, {"items": [{}]}, {"type": [[]]}, {"type": 3}, {"multipleOf": 0},
     {"uniqueItems": 1}, {"additionalProperties": "no"},
     {"additionalProperties": {"pattern": "x"}}, {"additionalProperties": {"minimum": None}}],
)  # fmt: skip
def test_a_rule_whose_value_means_nothing_is_refused(schema: dict) -> None:
    with pytest.raises(ValueError, match="write|not supported|not a schema"):
        check_schema(schema)


def test_no_value_makes_the_check_raise() -> None:
    odd = (
        {1, 2},
        b"x",
        object(),
        10**5000,
        [10**5000],
        {1: 2, "a": 3},
        {("a",): 1},
        "\ud800",
        (1,),
    )
    rules = ({"type": "string"}, {"uniqueItems": True}, {"enum": [1]}, {"const": "a"},
             {"additionalProperties": {"type": "null"}}, {"additionalProperties": False},
             {"items": {"type": "string"}}, {"multipleOf": 0.1}, {"maximum": 1.5})  # fmt: skip
    for value in odd:
        for schema in rules:
            faults(value, schema)
            faults([value, value], schema)


def test_an_example_fits_its_schema() -> None:
    draws = Draws("example")
    for _ in range(200):
        schema = random_schema(draws)
        assert not faults(example(schema), schema), schema
    for schema in ({"exclusiveMinimum": 3, "multipleOf": 4}, {"exclusiveMaximum": 0},
                   {"maximum": 5}, {"minimum": 5, "exclusiveMinimum": 5},
                   {"multipleOf": 3, "maximum": -1}):  # fmt: skip
        assert not faults(example(schema | {"type": "number"}), schema), schema


@pytest.mark.parametrize(
    ("value", "words"),
    [({}, "'n' is missing"), ({"n": "1"}, "n: '1' is not of type integer"),
     ({"n": True}, "not of type integer"), ({"n": 1.0}, "not of type integer"),
     ({"n": 0}, "n: 0 is less than 1"), ({"n": 1, "x": 2}, "'x' is unknown; the names are ['n']"),
     ({"n": 10**5000}, "a huge number is more than 9")],
)  # fmt: skip
def test_a_fault_names_place_value_and_rule(value: dict, words: str) -> None:
    spec = tool("t", "", {"n": {"type": "integer", "minimum": 1, "maximum": 9}})
    assert words in "; ".join(faults(value, spec["function"]["parameters"]))


def test_an_unsupported_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="t.a: .'pattern'. is not supported"):
        tool("t", "", {"a": {"type": "string", "pattern": "x"}})
    with pytest.raises(ValueError, match="type 'int' is unknown"):
        check_schema({"items": {"type": "int"}})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10**5, '{"a":' * 10**5, "NaN", "-Infinity", '{"a":1,"a":2}', "9" * 5000, "'a'"],
)
def test_what_is_not_json_raises_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        read_json(text)


def test_json_is_read_back() -> None:
    draws = Draws("json")
    for _ in range(100):
        value = random_value(draws, 4)
        assert equal(read_json(json.dumps(value)), value)
        assert canonical(read_json(canonical(value))) == canonical(value)


def test_equality_tells_truth_from_one() -> None:
    assert equal({"a": [1, None]}, {"a": [1.0, None]})
    assert not equal(True, 1) and not equal([0], [False]) and not equal({"a": 1}, {"b": 1})


def test_depth_is_measured_without_recursion() -> None:
    value: object = 1
    for _ in range(100_000):
        value = [value]
    assert too_large(value) and not too_large([[1]]) and too_large([0] * 50_000)
    assert faults(value, {}) and MAX_DEPTH < 100
    while isinstance(value, list):  # freed step by step: a deep list would recurse when dropped
        value = value[0]
