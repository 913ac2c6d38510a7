"""Random schemas on a model that knows nothing: what ends by `stop` is valid, always."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_jax.environments.schema import check_schema, faults
from tests.serving import schemas
from tests.serving.live import Live, live
from tests.serving.test_formats import json_schema

pytest.importorskip("llguidance")
# Of each kind as many, and so many with reasoning under a budget.
COUNTS = [
    pytest.param(40, marks=pytest.mark.more),
    pytest.param(1000, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(waiting=64) as one:
        one.generator.per_step = 64
        yield one


def answered(one: Live, number: int, schema: Any, *, thinking: bool, most: int) -> Any:
    """A choice; None for a schema that no grammar can be made of, which is said."""
    kwargs = {"enable_thinking": thinking, "reasoning_budget": 5 if thinking else None}
    answer = one.post(
        response_format=json_schema(schema),
        seed=number,
        max_tokens=most,
        chat_template_kwargs=kwargs,
    )
    assert answer.status_code == 200, (schema, answer.text)
    choice = answer.json()["choices"][0]
    assert thinking or not choice["message"]["reasoning"]
    return choice


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_bounded_schemas_all_come_out_valid(served: Live, count: int, thinking: bool) -> None:
    draw = random.Random(1 + thinking)
    for number in range(count):
        schema = schemas.schema(draw, 3)
        check_schema(without_patterns(schema))
        choice = answered(served, number, schema, thinking=thinking, most=3500)
        assert choice["finish_reason"] == "stop", schema
        value = json.loads(choice["message"]["content"])
        assert not faults(value, without_patterns(schema)), (schema, value)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_unbounded_schemas_end_by_length_or_valid(served: Live, count: int, thinking: bool) -> None:
    draw, ends = random.Random(3 + thinking), set()
    for number in range(max(count // 5, 20)):
        schema = schemas.schema(draw, 3, bounded=False)
        choice = answered(served, number, schema, thinking=thinking, most=60)
        ends.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            value = json.loads(choice["message"]["content"])
            assert not faults(value, schema), (schema, value)
    assert ends == {"stop", "length"}


@pytest.mark.parametrize("count", COUNTS)
def test_tools_are_called_by_their_schemas(served: Live, count: int) -> None:
    draw, called = random.Random(5), 0
    for number in range(count // 4):
        tools = [schemas.tool(draw, f"f{n}") for n in range(draw.randint(1, 3))]
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        kwargs = {"enable_thinking": number % 2 == 0, "reasoning_budget": 5}
        answer = served.post(
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=number,
            chat_template_kwargs=kwargs,
        )
        if answer.status_code == 400:  # a list of nothing but tags
            assert "can be written" in answer.text or "context_length" in answer.text, answer.text
            continue
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls", (number, tools, choice)
        (call,) = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        schema = without_patterns(known[call["function"]["name"]])
        assert not faults(arguments, schema), (schema, arguments)
        called += 1
    assert called > count // 8


def without_patterns(schema: Any) -> Any:
    """The schema less the rules that the checker cannot read."""
    if isinstance(schema, list):
        return [without_patterns(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: without_patterns(rule) for name, rule in schema.items() if name != "pattern"}
