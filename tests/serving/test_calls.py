"""Calls that have to come, or that are strict: always whole, of a tool, and by its schema."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_jax.environments.schema import faults
from nemotron_jax.serving.patterns import check_pattern
from tests.serving import schemas
from tests.serving.live import Live, live
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
