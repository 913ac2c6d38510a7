"""Chat completions: a turn's tokens as a message, streamed and whole the same."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_jax.data.chat.render import ChatOptions
from nemotron_jax.data.chat.tokens import encode_chat, encode_prompt
from nemotron_jax.serving.turns import message_of
from tests.serving.live import CHAT, CONTEXT, TOKENIZER, Live, ids_of, live

HELLO = [{"role": "user", "content": "hello"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
TURNS = (
    "two and two\n</think>\nfour<|im_end|>",
    "two</think>" + CALL + "<|im_end|>",
    CALL + "\n" + CALL.replace("1", "2") + "<|im_end|>",
    "</think>there <tool_call>\n<function=add>\nbroken<|im_end|>",
    "two and two and two",
    "</think>four é ☺ 😀 and <b> two</s>",
)


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live() as one:
        yield one


def joined(chunks: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str]:
    """The message and the reason of a stream's choice."""
    own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    assert own[0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [choice["finish_reason"] for choice in own]
    assert reasons[-1] and not any(reasons[:-1])
    return message_of([choice["delta"] for choice in own]), reasons[-1]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls are random."""
    calls = [{**call, "id": ""} for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize("stop", [None, " two", ["and", "☺"]], ids=str)
@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_a_stream_adds_up_to_the_whole_answer(served: Live, turn: int, stop: Any) -> None:
    served.script = TURNS[turn]
    body = {"tools": [ADD], "stop": stop, "max_tokens": 60}
    whole = served.post(**body).json()["choices"][0]
    for served.generator.per_step in (1, 2, 7):
        message, reason = joined(served.events(**body))
        assert without_ids(message) == without_ids(whole["message"])
        assert reason == whole["finish_reason"]
    text = f"{whole['message']['content']}{whole['message']['reasoning_content']}"
    for one in [stop] if isinstance(stop, str) else stop or []:
        assert one not in text
    assert "<|im_end|>" not in text and "</s>" not in text


def test_the_prompt_and_the_tokens_are_those_of_the_template_and_the_generator(
    served: Live,
) -> None:
    served.script = TURNS[0]
    found = served.post(return_token_ids=True, tools=[ADD], logprobs=True, top_logprobs=1).json()
    assert found["prompt_token_ids"] == encode_prompt(TOKENIZER, HELLO, [ADD])
    choice, request = found["choices"][0], served.generator.seen[-1]
    assert choice["token_ids"] == request.tokens == ids_of(TURNS[0])
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"] == "two and two"
    assert choice["message"]["content"] == "four" and choice["finish_reason"] == "stop"
    rows = choice["logprobs"]["content"]
    assert [row["logprob"] for row in rows] == request.logprobs
    assert b"".join(bytes(row["bytes"]) for row in rows).decode() == TURNS[0]
    assert all(len(row["top_logprobs"]) == 1 for row in rows)
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(request.prompt)
    assert usage["completion_tokens"] == len(request.tokens)
    thought = request.tokens.index(TOKENIZER.token_id("</think>"))
    assert usage["completion_tokens_details"]["reasoning_tokens"] == thought
    chunks = served.events(
        return_token_ids=True, tools=[ADD], logprobs=True, stream_options={"include_usage": True}
    )
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
    sent = [c for chunk in chunks for c in chunk["choices"]]
    assert sum((c.get("token_ids", []) for c in sent), []) == request.tokens
    scored = [row for c in sent if c.get("logprobs") for row in c["logprobs"]["content"]]
    assert [row["logprob"] for row in scored] == request.logprobs


def test_calls_are_whole_and_typed(served: Live) -> None:
    served.script = TURNS[2]
    found = served.post(tools=[ADD]).json()["choices"][0]
    calls = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1}, {"a": 2}]
    assert len({call["id"] for call in calls}) == 2
    one = served.post(tools=[ADD], parallel_tool_calls=False).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1
    served.post(tools=[ADD], tool_choice="none")
    assert list(served.generator.seen[-1].prompt) == encode_prompt(TOKENIZER, HELLO)


def test_switches_of_the_template_reach_prompt_and_budget(served: Live) -> None:
    served.script = "two and two and two\n</think>\nfour<|im_end|>"
    kwargs = {"reasoning_budget": 2, "low_effort": True}
    found = served.post(chat_template_kwargs=kwargs).json()["choices"][0]["message"]
    request = served.generator.seen[-1]
    assert list(request.prompt) == encode_prompt(TOKENIZER, HELLO, options=ChatOptions(**kwargs))
    assert request.wanted.budget.tokens == 2 and len(TOKENIZER.encode(found["reasoning"])) <= 2
    off = {"enable_thinking": False}
    served.script = "four<|im_end|>"
    found = served.post(chat_template_kwargs={**off, "reasoning_budget": 2}).json()
    assert found["choices"][0]["message"]["content"] == "four"
    assert served.generator.seen[-1].wanted.budget is None
    served.script = "two and<|im_end|>"  # an answer of nothing but reasoning
    kwargs = {"force_nonempty_content": True}
    found = served.post(chat_template_kwargs=kwargs).json()["choices"][0]["message"]
    assert found["content"] == found["reasoning"] == "two and"


def test_sampling_is_as_asked_or_the_checkpoints(served: Live) -> None:
    asked = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "min_tokens": 2}
    served.post(**asked, seed=-1, logit_bias={"20": -100}, max_tokens=5, n=2)
    first, second = served.generator.seen[-2:]
    for name, value in asked.items():
        assert getattr(first.wanted, name) == value
    assert first.wanted.seed == 2**32 - 1 and first.wanted.logit_bias == {20: -100}
    assert first.wanted.max_new_tokens == 5 and (first.branch, second.branch) == (0, 1)
    served.post()
    wanted = served.generator.seen[-1].wanted
    assert (wanted.temperature, wanted.top_p) == (1, 1)
    assert wanted.max_new_tokens == CONTEXT - len(served.generator.seen[-1].prompt)
    seeds = {served.generator.seen[-1].wanted.seed for _ in range(3) if served.post()}
    assert len(seeds) == 3  # nobody's answers repeat by accident


def test_given_prefix_ids_stand_as_they_are(served: Live) -> None:
    turn = {"role": "assistant", "content": "four", "reasoning_content": "two"}
    messages = [*HELLO, turn, {"role": "user", "content": "and?"}]
    own = [*encode_prompt(TOKENIZER, HELLO), *ids_of("t" + "wo\n</think>\nfour")]
    tail = encode_prompt(TOKENIZER, messages)
    past = encode_chat(TOKENIZER, messages[:2]).ids.tolist()
    rest = tail[len(tail) - tail[::-1].index(10) - 1 :]  # the next turn's opening
    for prefix in (own, [*own, TOKENIZER.token_id("<|im_end|>")]):
        served.post(messages=messages, required_prefix_token_ids=prefix)
        prompt = list(served.generator.seen[-1].prompt)
        assert prompt[: len(own)] == own and prompt[-len(rest) :] == rest
        assert TOKENIZER.decode(prompt[len(own) :], show_special=True).startswith(
            "<|im_end|>\n<|im_start|>user\nand?<|im_end|>"
        )
    assert past.count(11) == 3
    found = served.post(required_prefix_token_ids=own)
    assert found.status_code == 400 and "assistant" in found.json()["error"]["message"]


def test_samples_are_streamed_side_by_side(served: Live) -> None:
    served.script = TURNS[0]
    chunks = served.events(n=3)
    assert {joined(chunks, index)[0]["content"] for index in range(3)} == {"four"}
    assert len(served.post(CHAT, n=3).json()["choices"]) == 3


def test_random_texts_are_cut_at_the_first_stop_string(served: Live) -> None:
    draw = random.Random(0)
    for _ in range(12):
        text = "".join(draw.choice("ab<|é") for _ in range(20))
        stops = ["".join(draw.choice("ab<|é") for _ in range(draw.randint(1, 3))) for _ in "12"]
        served.script = "</think>" + text + "<|im_end|>"
        served.generator.per_step = draw.randint(1, 4)
        found = served.events(stop=stops)
        # The one that ends first ends the text; of those, the one that begins first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        message, reason = joined(found)
        assert message["content"] == (text[: min(ends)[1]] if ends else text) and reason == "stop"


def test_fields_that_clients_send_for_nothing_change_nothing(served: Live) -> None:
    served.script = TURNS[0]
    plain = {"bad_words": [], "use_beam_search": False, "continue_final_message": None}
    plain |= {"ignore_eos": False, "structured_outputs": None, "documents": [], "echo": False}
    plain |= {"include_reasoning": True, "add_generation_prompt": True, "truncate_prompt_tokens": 0}
    (choice,) = served.post(**plain).json()["choices"]
    assert choice["message"]["content"] == "four" and choice["finish_reason"] == "stop"
    part = {"type": "refusal", "refusal": "there"}
    for refused in ({"content": [part]}, {"content": None, "refusal": "there"}):
        served.post(messages=[*HELLO, {"role": "assistant", **refused}, *HELLO])
        assert "there" in TOKENIZER.decode(served.generator.seen[-1].prompt)


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "none"])
def test_efforts_mean_the_same_of_chats_and_responses(served: Live, effort: str) -> None:
    served.script = "four<|im_end|>"
    served.post(reasoning_effort=effort)
    served.post("/v1/responses", input="hello", reasoning={"effort": effort})
    chat, response = (request.prompt for request in served.generator.seen[-2:])
    shown = TOKENIZER.decode(chat, show_special=True)
    assert chat == response and shown.endswith("<think></think>") == (effort == "none")
    assert ("effort: low" in shown) == (effort in ("minimal", "low"))


def test_reasoning_is_left_out_and_ends_are_passed_where_asked(served: Live) -> None:
    served.script = TURNS[0]
    message, _ = joined(served.events(include_reasoning=False))
    assert (message["content"], message["reasoning"]) == ("four", None)
    (choice,) = served.post(ignore_eos=True, max_tokens=40).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == "four"
    stopped = served.post(ignore_eos=True, stop_token_ids=[TOKENIZER.token_id("</think>")])
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"


def test_clients_tell_a_conversation_that_is_too_long_by_its_words(served: Live) -> None:
    long = [{"role": "user", "content": "hello" * CONTEXT}]
    for body in ({"messages": long}, {"messages": HELLO, "max_tokens": CONTEXT}):
        error = served.post(**body).json()["error"]
        assert f"maximum context length is {CONTEXT} tokens" in error["message"]
        assert error["code"] == "context_length_exceeded"
