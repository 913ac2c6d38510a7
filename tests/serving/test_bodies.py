"""Whatever stands in a field of a body, the answer is one or a refusal: never a fault within."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.live import CHAT, Live, live

FUNCTION = {"name": "add", "description": "d", "strict": False}
FUNCTION |= {"parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
SAMPLING = {"model": "tiny", "temperature": 0.5, "top_p": 0.9, "seed": 3, "stream": False}
TEXT = {**SAMPLING, "max_tokens": 9, "n": 1, "top_k": 3, "min_p": 0.1, "min_tokens": 1}
TEXT |= {"stop": ["q"], "stop_token_ids": [3], "logit_bias": {"30": 1}, "return_token_ids": True}
TEXT |= {"stream_options": {"include_usage": True}, "frequency_penalty": 0}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "3"},
]
WHOLE: dict[str, dict[str, Any]] = {  # bodies that have every field
    CHAT: {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            {"role": "assistant", "reasoning_content": "r", "content": "a", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ],
        **TEXT,
        **{"logprobs": True, "top_logprobs": 2, "tools": TOOLS, "tool_choice": "auto"},
        **{"response_format": {"type": "text"}, "parallel_tool_calls": True},
        "chat_template_kwargs": {"enable_thinking": True, "reasoning_budget": 4},
        **{"reasoning_effort": "low", "required_prefix_token_ids": [20, 21]},
        **{"max_completion_tokens": 9, "thinking_token_budget": 5, "metadata": {"a": "b"}},
    },
    "/v1/completions": {"prompt": ["hello"], "echo": True, "logprobs": 1, **TEXT},
    "/v1/responses": {
        "input": ITEMS,
        **SAMPLING,
        **{"instructions": "i", "tools": [{"type": "function", **FUNCTION}], "include": []},
        **{"max_output_tokens": 9, "reasoning": {"effort": "low"}, "tool_choice": "auto"},
        "text": {"format": {"type": "text"}},
    },
    "/tokenize": {"prompt": "hello", "messages": None},
    "/detokenize": {"tokens": [20, 21, 22]},
}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 2**31, 2**64, 10**30, 1.5, -0.0, 1e308, float("inf")),
    *("", "a", "\0", "\ud800", "<|im_end|>", "a" * 5000, "required", "1e5", "add"),
    *([], [[]], [None], {}, {"a": None}, [1, 2], ["a"], [{}], {"type": "function"}),
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "regex", "regex": "[a-z]{1,4}"},
    {"type": "function", "name": "add"},
    {"type": "function", "function": {"name": "add"}},
]
SCRIPTS = ("four<|im_end|>", "two</think>four<|im_end|>", "<tool_call><function", "two" * 100)


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(slots=8, waiting=100) as one:
        yield one


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All lists and objects within a value, each with each of its places."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for place, one in inner:
        yield value, place
        if isinstance(one, dict | list):
            yield from places(one)


def changed(draw: random.Random, whole: dict[str, Any]) -> dict[str, Any]:
    """A body with some of the fields, in which something odd stands, or is missing."""
    body = {name: copy.deepcopy(v) for name, v in whole.items() if draw.random() < 0.7}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if found := list(places(body)):
            owner, place = draw.choice(found)
            if draw.random() < 0.2:
                del owner[place]
            else:
                owner[place] = copy.deepcopy(draw.choice(ODD))
    return body


def check(answer: httpx.Response, body: dict[str, Any]) -> None:
    """It is an answer, or a refusal that a client understands and that shows no more."""
    told = f"{answer.status_code} {answer.text[:300]} for {body}"
    assert answer.status_code in (200, 400, 404), told
    if answer.status_code == 200:
        assert "server_error" not in answer.text, told
        return
    error = answer.json()["error"]
    assert 0 < len(error["message"]) < 1000, told
    assert "Error" not in answer.text and "object at 0x" not in answer.text, told


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.more)])
def test_any_value_anywhere_is_answered_or_refused(served: Live, count: int) -> None:
    draw, answered = random.Random(count), 0
    for _ in range(count):
        path = draw.choice((CHAT, *WHOLE))
        body = changed(draw, WHOLE[path])
        served.script = draw.choice(SCRIPTS)
        answer = served.client.post(path, content=json.dumps(body))
        check(answer, body)
        answered += answer.status_code == 200
    assert 0.1 * count < answered < 0.9 * count and not served.driver.in_flight
