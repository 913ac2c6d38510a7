"""A row means one conversation however it is written, or is refused in one line."""

import copy
import json
import random

import pytest

from nemotron_jax.data.chat.render import pieces, render
from nemotron_jax.data.messages import check_row, read_messages, reasons, split_at_users

USER = {"role": "user", "content": "3*4?"}
ANSWER = {"role": "assistant", "content": "12"}
THOUGHT = ANSWER | {"reasoning_content": "easy"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calc",
            "parameters": {
                "type": "object",
                "properties": {
                    "e": {"type": "string"},
                    "digits": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
                },
                "required": ["e"],
            },
        },
    }
]


def call(number: object = "a", **arguments) -> dict:
    return {"id": number, "function": {"name": "calc", "arguments": arguments or {"e": "3*4"}}}


def asks(*calls: dict) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def reply(number: object = "a") -> dict:
    return {"role": "tool", "tool_call_id": number, "content": "12"}


def learned(messages: list, **row) -> list[str]:
    """The texts that the model learns to write, an example each."""
    found = []
    for part in split_at_users(check_row({"messages": messages, **row})):
        own = [m.get("weight", 1) if m["role"] == "assistant" else 0 for m in part.messages]
        whole = pieces(part.messages, part.tools, part.options)
        found.append("".join(x.text for x in whole if x.turn is not None and own[x.turn]))
    return found


def refused(messages: list, words: str, **row) -> None:
    with pytest.raises(ValueError) as error:
        check_row({"messages": messages, **row})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "<think>\nadd one\n</think>\n2"},
        {"content": "<think>add one</think>2"},
        {"content": " \n<think>\n\nadd one\n\n</think>\n\n2"},
        {"content": [{"type": "text", "text": "<think>\nadd one"}, {"text": "\n</think>2"}]},
        {"content": "2", "reasoning": "add one"},
        {"content": "2", "reasoning": "add one", "reasoning_content": "add one"},
        {"content": "2", "reasoning": "add one", "reasoning_content": ""},
        {"content": "<think>add one</think>2", "reasoning_content": "add one"},
    ],
)
def test_a_thought_is_one_wherever_it_stands(turn: dict) -> None:
    stated = {"role": "assistant", "content": "2", "reasoning_content": "add one"}
    for rest in ([], [USER, ANSWER], [USER, THOUGHT]):
        messages = [USER, {"role": "assistant"} | turn, *rest]
        assert learned(messages) == learned([USER, stated, *rest])
        assert reasons(check_row({"messages": messages}))
    empty = [USER, ANSWER | {"content": "<think>\n\n</think>\n\n12"}]
    assert learned(empty) == learned([USER, ANSWER])


def test_a_thought_that_could_be_two_is_refused() -> None:
    inline = {"role": "assistant", "content": "<think>a</think>2"}
    refused([USER, inline | {"reasoning_content": "b"}], "different thoughts")
    refused([USER, ANSWER | {"reasoning": "a", "reasoning_content": "b"}], "differ")
    refused([USER, ANSWER | {"reasoning": {"effort": 1}}], "`reasoning` is not text")
    refused([USER, ANSWER | {"reasoning_content": ["a"]}], "`reasoning_content` is not text")
    refused([USER, ANSWER | {"reasoning_details": [{"text": "a"}]}], "is not read")
    refused([USER, ANSWER | {"reasoning_content": "a </think> b"}], "`reasoning_content` holds")
    assert learned([USER, ANSWER | {"reasoning_content": "say <think>"}])
    for content in ("<think>never closed", "a</think>12", "say <think> here"):
        refused([USER, ANSWER | {"content": content}], "message 1: `content` holds <")


def test_an_assistant_that_speaks_first_is_learned_with_its_thought() -> None:
    first = {"role": "assistant", "content": "Hello", "reasoning_content": "greet"}
    system = {"role": "system", "content": "s"}
    expected = ["greet\n</think>\nHello<|im_end|>", "easy\n</think>\n12<|im_end|>"]
    for before in ([], [system]):
        assert learned([*before, first, USER, THOUGHT]) == expected
        assert learned([*before, first, USER, THOUGHT | {"weight": 0}]) == expected[:1]
        assert learned([*before, first | {"weight": 0}, USER, THOUGHT]) == expected[1:]


def test_turns_that_are_not_to_be_learned_are_not() -> None:
    for mask in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": False, "weight": 0}):
        assert learned([USER, ANSWER | mask | {"content": "no"}, USER, ANSWER]) == ["12<|im_end|>"]
    for mask in ({"weight": 1}, {"train": True}, {"train": None}, {"weight": None}):
        assert learned([USER, ANSWER | mask]) == ["12<|im_end|>"]
    refused([USER, ANSWER | {"weight": 0.5}], "weight=0.5: must be 0 or 1")
    refused([USER, ANSWER | {"train": "no"}], "train='no': must be true or false")
    refused([USER, ANSWER | {"train": False, "weight": 1}], "`train` and `weight` differ")
    refused([USER | {"train": True}, ANSWER], "key 'train' of a 'user' message is unknown")
    assert learned([USER | {"weight": 0}, ANSWER]) == ["12<|im_end|>"]


def test_keys_that_nobody_reads_are_refused_unless_they_say_nothing() -> None:
    extra = {"id": "m1", "finish_reason": "stop", "refusal": None, "audio": None, "name": "bot"}
    assert check_row({"messages": [USER, ANSWER | extra]}) == check_row(
        {"messages": [USER, ANSWER]}
    )
    for key, value in (("mask", 0), ("function_call", {"name": "f"}), ("thinking", "a")):
        refused([USER, ANSWER | {key: value}], f"message 1: key {key!r} of a 'assistant' message")
    refused([USER | {"tool_calls": [call()]}, ANSWER], "key 'tool_calls' of a 'user'")
    for key in ("system", "functions"):
        refused([USER, ANSWER], f"key {key!r} is not read", **{key: "x"})


def test_a_call_is_declared_and_answered() -> None:
    two = asks(call("a"), call("b"))
    assert learned([USER, two, reply("b"), reply("a"), ANSWER], tools=TOOLS)
    assert learned([USER, two], tools=TOOLS)  # the row ends with what is learned
    found = check_row({"messages": [USER, two, reply("b"), reply("a"), ANSWER]}).messages
    assert [m["tool_call_id"] for m in found[2:4]] == ["a", "b"]  # no ids are rendered
    refused([USER, two, USER, ANSWER], "message 2: the turn before calls tools")
    refused([USER, two, reply("b"), ANSWER], "message 3: the turn before calls tools")
    refused([USER, two, reply("b")], "the last calls are not all answered")
    other = [{"name": "other"}]
    refused([USER, asks(call())], "message 1: it calls 'calc', which is none", tools=other)


def test_ids_are_compared_as_text() -> None:
    for one, other in ((1, 1), (1, "1"), ("1", 1), (0, 0)):
        assert learned([USER, asks(call(one)), reply(other), ANSWER])
    refused([USER, asks(call(0)), reply(1), ANSWER], "answers 1, which no call")


def test_what_tables_keep_as_json_text_is_read() -> None:
    messages = [USER, asks(call()), reply(), ANSWER]
    plain = check_row({"messages": messages, "tools": TOOLS})
    text = copy.deepcopy(messages)
    text[1]["tool_calls"] = json.dumps(text[1]["tool_calls"])
    functions = copy.deepcopy(TOOLS)
    functions[0]["function"]["parameters"] = json.dumps(functions[0]["function"]["parameters"])
    for tools in (json.dumps(TOOLS), functions):
        assert check_row({"messages": text, "tools": tools}) == plain
        assert check_row({"messages": json.dumps(text), "tools": tools}) == plain


def filled(value):
    """A value as a table gives it back: every object with every field that any other has."""
    fields = ("description", "enum", "items", "unit", "reasoning_content", "weight", "refusal")
    if isinstance(value, dict):
        return dict.fromkeys(fields) | {key: filled(inner) for key, inner in value.items()}
    return [filled(inner) for inner in value] if isinstance(value, list) else value


def test_nulls_of_a_table_change_nothing() -> None:
    kwargs = {"low_effort": True}
    row = {"messages": [USER, asks(call()), reply(), THOUGHT], "tools": TOOLS}
    row["chat_template_kwargs"] = kwargs
    plain, full = check_row(row), check_row(filled(row) | {"chat_template_kwargs": kwargs})
    assert full.digest() == plain.digest()
    assert render(full.messages, full.tools) == render(plain.messages, plain.tools)
    assert "<default>None</default>" in render(plain.messages, plain.tools)  # pydantic's own
    shown = asks(call(e="1", digits=None, unit=None))
    read = check_row({"messages": [USER, shown], "tools": TOOLS}).messages[1]["tool_calls"][0]
    assert read["function"]["arguments"] == {"e": "1", "digits": None}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [{"from": "human", "value": "x"}]}, "ShareGPT"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca"),
        ({"prompt": "a", "completion": "b"}, "a prompt with its completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a pair of preferences"),
        ({"text": "a"}, "pre-training reads"),
        ({"chat": [USER, ANSWER]}, "has one `chat`; call that `messages`"),
        ({"input": [], "output": "b"}, "an input with its output"),
        ([USER, ANSWER], "the list alone"),
    ],
)
def test_another_form_is_called_by_its_name(tmp_path, row, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=words) as error:
        read_messages(tmp_path / "a.jsonl", 0.0, "error")
    assert "`messages`" in str(error.value).replace('"messages"', "`messages`")
    assert "bad_rows" not in str(error.value)  # all rows are of this form
    refused([{"from": "human", "value": "x"}], "`from` and `value` are ShareGPT's")
    assert check_row({"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]}) == (
        check_row({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]})
    )


def test_a_row_is_what_a_line_feed_ends(tmp_path) -> None:
    texts = ["a\u2028b", "a\u2029b\u0085c", "\x0b\x0c\x1c\x1d\x1e", "d"]
    rows = [{"messages": [USER, ANSWER | {"content": f"x{text}x"}]} for text in texts]
    lines = [json.dumps(row, ensure_ascii=False).replace(", ", ",\r") for row in rows]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_bytes("\n".join(lines).encode())
    found = [
        read_messages(tmp_path / f, 0.0, "error").train for f in ("a.jsonl", "b.json", "c.json")
    ]
    assert [[c.messages[1]["content"] for c in one] for one in found] == [
        [f"x{text}x" for text in texts]
    ] * 3
    (tmp_path / "e.json").write_text(json.dumps(rows[0], indent=1))
    assert len(read_messages(tmp_path / "e.json", 0.0, "error").train) == 1
    with pytest.raises(ValueError, match=r"f.csv is a table or an archive; write .* jsonl"):
        read_messages(tmp_path / "f.csv", 0.0, "drop")
    (tmp_path / "d.jsonl").write_bytes(lines[0].encode() + b'\n{"\xff"\n' + lines[1].encode())
    kept = read_messages(tmp_path / "d.jsonl", 0.0, "drop")
    assert len(kept.train) == 2 and "row 2: it is not UTF-8" in kept.dropped[0]


ATOMS = [
    None,
    True,
    0,
    1.5,
    -1,
    "",
    "x",
    "\ud83d",
    "<think>",
    "[]",
    '{"a": 1}',
    float("nan"),
    {},
    [],
]
KEYS = ["role", "content", "tool_calls", "function", "name", "arguments", "id", "weight", "type"]
KEYS += ["properties", "parameters", "text", "reasoning", "default", "anyOf", "x"]


def odd(draw: random.Random, depth: int = 3):
    kind = draw.random()
    if depth == 0 or kind < 0.5:
        return draw.choice(ATOMS)
    if kind < 0.7:
        return [odd(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(KEYS): odd(draw, depth - 1) for _ in range(draw.randint(0, 4))}


def spoilt(value, draw: random.Random, chance: float):
    """The value with some parts of it replaced."""
    if draw.random() < chance:
        return odd(draw)
    if isinstance(value, dict):
        return {key: spoilt(one, draw, chance) for key, one in value.items()}
    return [spoilt(one, draw, chance) for one in value] if isinstance(value, list) else value


def test_an_odd_row_is_used_or_refused_and_nothing_else() -> None:
    good = {"messages": [USER, asks(call(), call("b")), reply(), reply("b"), THOUGHT]}
    good |= {"tools": TOOLS, "chat_template_kwargs": {"reasoning_budget": 5}}
    draw, used = random.Random(0), 0
    for _ in range(1500):
        try:
            found = check_row(spoilt(good, draw, draw.choice([0.01, 0.03, 0.2])))
        except ValueError as error:
            assert "\n" not in str(error) and str(error).encode()
            continue
        used += 1
        assert found.digest()
        for part in split_at_users(found):
            assert render(part.messages, part.tools, part.options).encode()
    assert used > 150


def test_a_row_that_is_nested_deep_is_refused() -> None:
    deep: dict = {}
    for _ in range(5000):
        deep = {"items": deep}
    refused([USER, ANSWER], "nested deeper", tools=[{"name": "f", "parameters": deep}])
    refused([USER, asks(call(e=deep))], "message 1: it is nested deeper")
    refused([USER, ANSWER], "nested deeper", chat_template_kwargs=deep)
    while deep:  # freed step by step: a deep value would recurse when dropped
        deep = deep["items"]
