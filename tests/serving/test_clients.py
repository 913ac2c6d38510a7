"""The stock client of OpenAI works unchanged, on every endpoint that it has."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.live import TOKENIZER, Live, live
from tests.serving.test_chat_completions import ADD, CALL, HELLO

openai = pytest.importorskip("openai")
THOUGHT = "two and two\n</think>\nfour<|im_end|>"
RESPONSES = "/v1/responses"
FLAT = {"type": "function", **ADD["function"]}


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(keys=("one",)) as one:
        one.client.headers["Authorization"] = "Bearer one"
        yield one


@pytest.fixture(scope="module")
def client(served: Live) -> Any:
    url = f"http://127.0.0.1:{served.address[1]}/v1"
    return openai.OpenAI(base_url=url, api_key="one", max_retries=0, timeout=30)


def test_models_and_errors_are_the_clients_own(served: Live, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError):
        create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=HELLO, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="two").models.list()


def test_chats_whole_and_streamed(served: Live, client: Any) -> None:
    served.script = THOUGHT
    create = client.chat.completions.create
    found = create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=1)
    message = found.choices[0].message
    assert (message.content, message.reasoning) == ("four", "two and two")
    assert found.choices[0].logprobs.content[0].top_logprobs[0].token
    assert found.usage.completion_tokens_details.reasoning_tokens > 0
    options = {"include_usage": True}
    chunks = list(create(model="tiny", messages=HELLO, stream=True, stream_options=options))
    content = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(content) == "four" and chunks[-1].usage == found.usage
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        events = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == "four"
    assert "content.delta" in events
    text = client.completions.create(model="tiny", prompt="two", echo=True, logprobs=1)
    assert text.choices[0].text.startswith("two") and text.choices[0].logprobs.tokens
    parts = client.completions.create(model="tiny", prompt="two", stream=True)
    assert "".join(part.choices[0].text for part in parts)


def test_tools_of_a_conversation(served: Live, client: Any) -> None:
    served.script = "one</think>\n" + CALL + "<|im_end|>"
    create = client.chat.completions.create
    turn = create(model="tiny", messages=HELLO, tools=[ADD]).choices[0]
    assert turn.finish_reason == "tool_calls"
    (call,) = turn.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[ADD]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'
    reply = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    create(model="tiny", messages=[*HELLO, turn.message, reply], tools=[ADD])
    shown = TOKENIZER.decode(served.generator.seen[-1].prompt, show_special=True)
    assert "one" in shown and "<tool_response>\n3\n</tool_response>" in shown
    forced = create(model="tiny", messages=HELLO, tools=[ADD], tool_choice="required", seed=1)
    assert all(call.function.name == "add" for call in forced.choices[0].message.tool_calls)


def test_a_response_and_its_events(served: Live, client: Any) -> None:
    served.script = "two and\n</think>\nfour\n" + CALL + "<|im_end|>"
    asked = {"model": "tiny", "input": "hello", "tools": [FLAT], "instructions": "Add."}
    found = client.responses.create(**asked)
    assert found.status == "completed" and found.output_text == "four"
    thought, message, call = found.output
    assert [one.type for one in found.output] == ["reasoning", "message", "function_call"]
    assert thought.content[0].text == "two and" and message.content[0].text == "four"
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
    shown = TOKENIZER.decode(served.generator.seen[-1].prompt, show_special=True)
    assert shown.startswith("<|im_start|>system\nAdd.\n\n# Tools")
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    item = ["output_item.added", "content_part.added", "TEXT.delta", "TEXT.done"]
    item += ["content_part.done", "output_item.done"]
    arguments = ["function_call_arguments.delta", "function_call_arguments.done"]
    expected = ["created", "in_progress"]
    expected += [kind.replace("TEXT", "reasoning_text") for kind in item]
    expected += [kind.replace("TEXT", "output_text") for kind in item]
    expected += [item[0], *arguments, item[-1], "completed"]
    once = [k for k, before in zip(kinds, [None, *kinds], strict=False) if k != before]
    assert once == expected
    parts = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    final = events[-1].response
    assert parts == final.output_text == "four" and final.usage == found.usage
    assert [e.output_index for e in events if e.type.endswith("item.added")] == [0, 1, 2]
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "four"


def test_the_items_of_a_response_go_back_as_they_came(served: Live, client: Any) -> None:
    served.script = "two and\n</think>\nfour\n" + CALL + CALL + "<|im_end|>"
    first = client.responses.create(model="tiny", input="hello", tools=[FLAT])
    calls = [item for item in first.output if item.type == "function_call"]
    replies = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls
    ]
    given = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    client.responses.create(model="tiny", input=[*given, *first.output, *replies], tools=[FLAT])
    own = list(served.generator.seen[-1].prompt)
    arguments = {"name": "add", "arguments": '{"a": 1}'}
    turn = {"role": "assistant", "reasoning_content": "two and", "content": "four"}
    turn["tool_calls"] = [{"type": "function", "function": arguments}] * 2
    chat = [*HELLO, turn, *({"role": "tool", "content": "3"} for _ in calls)]
    served.post("/v1/chat/completions", messages=chat, tools=[ADD])
    assert own == list(served.generator.seen[-1].prompt)


def test_a_response_that_is_cut_off_formed_or_scored(served: Live, client: Any) -> None:
    served.script = "two and two and two and two"
    cut = client.responses.create(model="tiny", input="hello", max_output_tokens=4)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    events = list(
        client.responses.create(model="tiny", input="hello", max_output_tokens=4, stream=True)
    )
    assert events[-1].type == "response.incomplete"
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "name": "it", "schema": schema, "strict": True}}
    off = {"effort": "none"}
    found = client.responses.create(model="tiny", input="hello", text=form, reasoning=off)
    assert set(json.loads(found.output_text)) == {"on"}
    served.script = THOUGHT
    scored = client.responses.create(
        model="tiny", input="hello", include=["message.output_text.logprobs"], top_logprobs=1
    )
    rows = scored.output[-1].content[0].logprobs
    assert "".join(row.token for row in rows).strip("\n") == "four<|im_end|>"
    forced = client.responses.create(
        model="tiny", input="hello", tools=[FLAT], tool_choice={"type": "function", "name": "add"}
    )
    assert [item.type for item in forced.output if item.type != "reasoning"] == ["function_call"]


@pytest.mark.parametrize(
    "body, field",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"n": 2}, "n"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input"),
        ({"input": "a" * 90_000}, "input"),
        ({"input": [{"role": "root", "content": "a"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 3}]}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": 3, "arguments": "{}"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": 3}, "text"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"include": 3}, "include"),
        ({"temperature": "hot"}, "temperature"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_response_is_named(served: Live, body: Any, field: str) -> None:
    answer = served.post(RESPONSES, **{"input": "hello", **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field, error
    assert not error["message"].startswith("messages")


def test_a_response_that_fails_within_says_so(served: Live) -> None:
    served.script = THOUGHT
    served.generator.gate.clear()
    url = f"http://127.0.0.1:{served.address[1]}"
    headers = {"Authorization": "Bearer one"}
    body = {"input": "hello", "stream": True}
    with httpx.stream("POST", url + RESPONSES, json=body, headers=headers, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"
        served.generator.faults = 3
        served.generator.gate.set()
        rest = list(lines)
    assert "event: error" in rest and "[DONE]" not in "".join(rest)
