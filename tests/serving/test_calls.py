"""Calls that have to come, or that are strict: always whole, of a tool, and by its schema."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_jax.data.chat.schemas import Schemas
from nemotron_jax.environments.schema import faults
from nemotron_jax.serving.call_grammars import calls_grammar
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.grammars import calls_of_tools
from nemotron_jax.serving.patterns import check_pattern
from tests.serving import schemas
from tests.serving.live import TOKENIZER, Live, ids_of, live
from tests.serving.test_chat_completions import joined, without_ids

pytest.importorskip("llguidance")
NO_THINKING = {"enable_thinking": False}
# One parameter of each kind that a call has a form of its own for.
PARAMETERS = {
    "type": "object",
    "$defs": {"kind": {"enum": ["x", 3, "3", "null", None]}},
    "properties": {
        "count": {"type": "integer"},
        "text": {"type": "string", "minLength": 1, "maxLength": 5},
        "kind": {"$ref": "#/$defs/kind"},
        "either": {"type": ["string", "integer"], "maxLength": 4, "minimum": 0, "maximum": 9},
        "list": {"type": "array", "items": {"$ref": "#/$defs/kind"}, "maxItems": 2},
        "path": {"type": "string", "pattern": "^[a-c/]+$", "maxLength": 3},
        "maybe": {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 2, "maxLength": 3}]},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "VALUE": {"enum": ['VALUE: "a" | b', "V[lazy]: /x/", "</parameter>"]},
    },
    "required": ["count", "text", "kind", "either", "list", "path", "maybe", "share", "VALUE"],
    "additionalProperties": False,
}
KIND = {"enum": ["x", 3, "3", "null", None]}
CHECKED = {  # the same, as the checker can read it
    **{name: rule for name, rule in PARAMETERS.items() if name != "$defs"},
    "properties": PARAMETERS["properties"]
    | {
        "kind": KIND,
        "list": {"type": "array", "items": KIND, "maxItems": 2},
        "maybe": {"type": ["null", "string"], "minLength": 2, "maxLength": 3},
        "path": {"type": "string", "maxLength": 3},
    },
}
EVERY = {"type": "function", "function": {"name": "every", "parameters": PARAMETERS}}
NOTHING = {"type": "function", "function": {"name": "no-thing"}}


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(waiting=64) as one:
        yield one


def calls_of(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_that_has_to_come_fits_its_schema(served: Live, thinking: bool) -> None:
    kwargs = {"enable_thinking": thinking, "reasoning_budget": 4 if thinking else None}
    body = {"tools": [EVERY, NOTHING], "tool_choice": "required", "chat_template_kwargs": kwargs}
    found = served.post(**body, n=6, seed=3).json()["choices"]
    seen = {}
    for choice in found:
        # By chance calls may follow one another until no room is left.
        cut_off = choice["finish_reason"] == "length"
        assert (
            cut_off or choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
        )
        assert bool(choice["message"]["reasoning"]) == thinking
        for name, arguments in calls_of(choice):
            seen.setdefault(name, []).append(arguments)
            assert arguments == {} or not faults(arguments, CHECKED)
    assert set(seen) == {"every", "no-thing"}
    assert len({json.dumps(one["either"]) for one in seen["every"]}) > 1
    whole = served.post(**body, seed=5).json()["choices"][0]
    for served.generator.per_step in (1, 11):
        message, reason = joined(served.events(**body, seed=5))
        assert without_ids(message) == without_ids(whole["message"])
        assert reason == "tool_calls"


def test_a_named_tool_is_called_once_and_several_only_where_they_may(served: Live) -> None:
    body = {"tools": [EVERY, NOTHING], "chat_template_kwargs": NO_THINKING, "n": 6, "seed": 1}
    named = {"type": "function", "function": {"name": "no-thing"}}
    for choice in served.post(**body, tool_choice=named).json()["choices"]:
        assert calls_of(choice) == [("no-thing", {})]
    required = {**body, "tool_choice": "required"}
    many = [len(calls_of(one)) for one in served.post(**required).json()["choices"]]
    assert max(many) > 1
    single = served.post(**required, parallel_tool_calls=False).json()["choices"]
    assert {len(calls_of(one)) for one in single} == {1}


def test_strict_tools_leave_text_free_and_hold_every_call(served: Live) -> None:
    strict = {"type": "function", "function": {**EVERY["function"], "strict": True}}
    asked = {"tools": [strict], "chat_template_kwargs": NO_THINKING, "max_tokens": 600}
    found = served.post(**asked, n=10, seed=2).json()["choices"]
    called = [call for choice in found for call in calls_of(choice)]
    assert called and all(not faults(arguments, CHECKED) for _, arguments in called)
    assert any(not calls_of(choice) and choice["message"]["content"] for choice in found)
    served.script = "two"
    served.post(**{**asked, "tools": [EVERY]})
    assert served.generator.seen[-1].wanted.grammar is None  # drafts, and many rounds at a time


def test_a_format_and_tools_are_kept_together(served: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    body = {"tools": [NOTHING], "response_format": form, "chat_template_kwargs": NO_THINKING}
    kinds = set()
    for choice in served.post(**body, n=8, seed=4).json()["choices"]:
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert not faults(json.loads(choice["message"]["content"]), schema)
        else:
            assert calls_of(choice)[0] == ("no-thing", {})
    assert kinds == {"stop", "tool_calls"}


def test_random_tools_are_called_by_their_schemas(served: Live) -> None:
    draw = random.Random(0)
    for number in range(4):
        tools = [schemas.tool(draw, f"f{n}") for n in range(draw.randint(1, 3))]
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        answer = served.post(
            tools=tools, tool_choice="required", seed=number, n=2, chat_template_kwargs=NO_THINKING
        )
        refused = answer.status_code == 400 and "can be written" in answer.text
        for choice in () if refused else answer.json()["choices"]:
            assert choice["finish_reason"] == "tool_calls"
            for name, arguments in calls_of(choice):
                assert not faults(arguments, known[name]), (known[name], arguments)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "nothing"}}},
        {"properties": {"a": {"type": "string", "pattern": "(((("}}},
        {"properties": {"a": {"type": "string", "pattern": "a\\"}}},
        {"properties": {"a": {"type": "string", "pattern": "((a{900}){900}){900}"}}},
        {"properties": {"a": {"type": "array", "items": {"pattern": "((a{900}){900}){900}"}}}},
        {"properties": {"a>\n<b": {"type": "string"}}},
        {"properties": {"a": {"$ref": "#/nowhere"}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
        {"properties": {"a": {"enum": ["</parameter>", "</tool_call>"]}}},
        {"properties": {"a": {"type": "string", "minLength": -1}}},
        {"properties": {"a": {"type": "string", "not": {"const": "a"}}}},
        {"oneOf": [{"properties": {}}]},
        {"required": ["b"], "additionalProperties": False},
        {"required": "b"},
        {"properties": {"a": {"anyOf": 1.5}}},
        {"properties": {"a": {"type": "string", "maxLength": 2, "allOf": 3}}},
        {"properties": {"a": {"type": 3}}},
        {"properties": [1]},
        {"$ref": "#/$defs/T", "$defs": 3},
        {"$ref": "#"},
    ],
    ids=str,
)
def test_a_schema_that_calls_cannot_be_held_to_is_refused(served: Live, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = served.post(tools=[NOTHING, tool], tool_choice="required", max_tokens=1)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in ("tools", "tools[1]")
    assert len(answer.json()["error"]["message"]) < 400


def test_an_expression_is_bounded_by_what_it_unrolls_to() -> None:
    for small in ("a{9999}", "([a-z]{1,100}\\d){1,50}", "[{100000}]x", "\\{500000}", "(((", "]})"):
        check_pattern(small)
    for large in ("((a{99}){99}){99}", "a{5}{100}{1000}", "x{,200000}", "(?:a{1000}){101}"):
        with pytest.raises(ValueError, match="count less"):
            check_pattern(large)


def takes(schema: dict[str, Any], text: str, **parameters: Any) -> bool:
    """Whether a call that is held may give a text for its only parameter."""
    if not parameters:
        parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    options = {"single": True, "required": True, "thinking": False, "budgeted": False}
    size = TOKENIZER.vocab_size
    form = calls_of_tools(Fields({}), TOKENIZER, size, (TOKENIZER.eos,), tools, **options)
    grammar = form.grammar()
    call = (
        f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    )
    try:
        for token in ids_of(call):
            grammar.mask()  # fails where it takes too much
            grammar.accept(token)
        return True
    except RuntimeError:
        return False


def test_a_text_beside_another_type_is_none_that_would_be_read_as_that() -> None:
    texts = {"2024-05-01", "3 apples", "None of them", "[a", "{1}", '"a" and b', "007", "true"}
    texts |= {'"a" or "b"', '"a\\"'}
    for kind, others in (
        ("null", set()),
        ("integer", {"2024-05-01", "3 apples", "007"}),
        ("boolean", {"true"}),
        ("array", {"[a"}),
        ("object", {"{1}"}),
    ):
        schema = {"anyOf": [{"type": "string", "minLength": 2}, {"type": kind}]}
        tool = {"function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
        read = Schemas([tool]).value
        for text in texts - others:
            assert takes(schema, text) and read("f", "a", text) == text
        values = {"null": "null", "integer": "5", "boolean": "true", "array": "[]", "object": "{}"}
        for name, text in values.items():
            assert name != kind or takes(schema, text) and not isinstance(read("f", "a", text), str)
        never = {'"a"', r'"a\"b"', "a"} | others - {"true"}
        assert not any(takes(schema, text) for text in never)


def test_texts_of_dates_are_dates() -> None:
    for form, good, bad in (
        ("date", ("2024-02-29", "1999-12-31"), ("2023-02-29", "1900-02-29", "2024-04-31", "soon")),
        ("time", ("23:59:00Z", "01:02:03.5+01:00"), ("24:00:00Z", "noon")),
        ("date-time", ("2024-02-29T01:02:03Z",), ("2024-02-29",)),
        ("uuid", ("123e4567-e89b-12d3-a456-426614174000",), ("123e4567",)),
        ("what", ("anything",), ()),
        (["date"], ("anything",), ()),
    ):
        optional = {"anyOf": [{"type": "string", "format": form}, {"type": "null"}]}
        for schema in ({"type": "string", "format": form}, optional):
            assert all(takes(schema, text) for text in good)
            assert not any(takes(schema, text) for text in bad)


def test_references_that_stand_for_too_much_are_refused() -> None:
    known = {f"T{n}": {"anyOf": 6 * [{"$ref": f"#/$defs/T{n + 1}"}]} for n in range(7)}
    known["T7"] = {"type": "string", "minLength": 1}
    large = {"anyOf": [{"type": "array", "items": {"enum": ["a" * 50_000]}}, {"type": "string"}]}
    properties = {f"a{n}": {"$ref": "#/$defs/A"} for n in range(100)}
    for parameters in (
        {"$defs": known, "properties": {"a": {"$ref": "#/$defs/T0"}}},
        {"$defs": {"A": large}, "properties": properties},
    ):
        tool = {"function": {"name": "f", "parameters": parameters}}
        with pytest.raises(ValueError, match="its schemas refer to too much"):
            calls_grammar([tool], parallel=False, answer=None)


@pytest.mark.parametrize("kind", [None, "null", "integer"])
def test_long_bounds_of_texts_are_kept(kind: str | None) -> None:
    schema = {"type": "string", "minLength": 1, "maxLength": 3000}
    schema = schema if kind is None else {"anyOf": [schema, {"type": kind}]}
    assert takes(schema, "a </b> é" * 375)
    assert not takes(schema, "a </b> é" * 375 + "b")


def test_parameters_may_hold_themselves() -> None:
    """As a recursive model has it: by a definition, by all of it, or by a part of it."""
    tree = {"type": "object", "additionalProperties": False}
    list_of = lambda reference: {"type": "array", "items": {"$ref": reference}}
    named = {
        "$defs": {"T": {**tree, "properties": {"a": list_of("#/$defs/T")}}},
        "$ref": "#/$defs/T",
    }
    whole = {**tree, "properties": {"a": list_of("#")}}
    part = {**tree, "properties": {"a": list_of("#/properties/b"), "b": {**whole}}}
    for parameters in (named, whole, part):
        assert takes({}, '[{"a": [{"a": []}]}]', **parameters)
        assert not takes({}, '[{"b": 1}]', **parameters)
        assert not takes({}, "[1]", **parameters)


def test_a_line_end_after_the_reasoning_does_not_mean_a_call() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    part = {"type": "json_schema", "json_schema": {"schema": schema}}
    options = {"single": True, "required": False, "thinking": True, "budgeted": False}
    fields, size = Fields({"response_format": part}), TOKENIZER.vocab_size
    form = calls_of_tools(fields, TOKENIZER, size, (TOKENIZER.eos,), [NOTHING], **options)
    for answer in ('\n{"a":true}', '{"a":true}', "\n<tool_call>\n<function=no-thing>\n"):
        grammar = form.grammar()
        assert all(grammar.accept(token) for token in ids_of(f"two</think>{answer}"))


def test_allowed_tools_are_the_only_ones(served: Live) -> None:
    flat = {"type": "allowed_tools", "tools": [{"type": "function", "name": "no-thing"}]}
    nested = {"type": "function", "function": {"name": "no-thing"}}
    for choice in (
        {**flat, "mode": "required"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [nested]}},
    ):
        body = {"tools": [EVERY, NOTHING], "tool_choice": choice, "parallel_tool_calls": False}
        found = served.post(**body, n=3, chat_template_kwargs=NO_THINKING).json()["choices"]
        assert [calls_of(one) for one in found] == [[("no-thing", {})]] * 3
    served.script = "two"
    auto = served.post(tools=[EVERY, NOTHING], tool_choice={**flat, "mode": "auto"})
    shown = TOKENIZER.decode(served.generator.seen[-1].prompt)
    assert auto.status_code == 200 and "no-thing" in shown and "every" not in shown
    for wrong in ({"mode": "all"}, {"tools": []}, {"tools": [{"name": "other"}]}, {"tools": 3}):
        answer = served.post(tools=[NOTHING], tool_choice={**flat, "mode": "auto", **wrong})
        assert answer.json()["error"]["param"] == f"tool_choice.{next(iter(wrong))}"


@pytest.mark.parametrize("value", ["</tool_call>", "<|im_end|>", "a</parameter>\\n</function>"])
def test_names_of_tags_are_text_in_a_call_that_is_held(served: Live, value: str) -> None:
    schema = {"properties": {"a": {"enum": [[value, "<"]]}, "b": {"items": {"const": value}}}}
    schema["properties"]["b"] |= {"type": "array", "minItems": 1, "maxItems": 2}
    parameters = {"type": "object", **schema, "required": ["b"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"tools": [tool], "tool_choice": "required", "chat_template_kwargs": NO_THINKING}
    for served.generator.per_step in (1, 2, 50):
        for choice in served.post(**body, n=3, seed=1, parallel_tool_calls=False).json()["choices"]:
            ((_, arguments),) = calls_of(choice)
            assert set(arguments["b"]) == {value}
