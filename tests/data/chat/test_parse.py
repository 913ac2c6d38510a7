"""A turn parses to what was rendered, in any cuts, and nothing that a model writes raises."""

import json
import random
import time

import pytest

from nemotron_jax.data.chat.events import (
    CallArguments,
    CallEnded,
    Content,
    Malformed,
    Reasoning,
    TurnEnded,
    joined,
)
from nemotron_jax.data.chat.parse import TurnParser, parse_turn
from nemotron_jax.data.chat.render import calls_of, render
from tests.data.chat.test_render import GOLDEN

TOOLS = [
    {
        "name": "f",
        "parameters": {
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "rows": {"type": ["array", "object"]},
            }
        },
    }
]
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>")
TAGS += ("<parameter=", "</parameter>", "<|im_end|>")
OPEN_CALL = "<tool_call>\n<function=f>\n<parameter=text>\n"
THOUGHT_CALL = OPEN_CALL + "1\n</parameter>\n</function>\n</tool_call>"


def body(message: dict, tools=None) -> str:
    """What the template writes of a turn, its opening left out."""
    whole = render([{"role": "user", "content": ""}, message], tools)
    return whole.split("<|im_start|>assistant\n", 1)[1].removesuffix("\n")


def events(cuts: list[str], **options) -> list:
    parser = TurnParser(**options)
    return joined([event for cut in cuts for event in parser.push(cut)] + parser.finish())


def turns() -> list[tuple[str, dict, list | None]]:
    """Every turn of the golden conversations that the template writes whole."""
    whole = [c for c in GOLDEN if not c["name"].startswith("broken")]
    messages = [(c["name"], m, c["tools"]) for c in whole for m in c["messages"]]
    return [(name, m, tools) for name, m, tools in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("turn", turns(), ids=lambda turn: turn[0])
def test_a_rendered_turn_parses_to_the_turn(turn: tuple[str, dict, list | None]) -> None:
    name, message, tools = turn
    parsed = parse_turn(body(message, tools), tools=tools)
    assert parsed.closed and not parsed.malformed
    assert [(c.name, c.arguments) for c in parsed.calls] == list(calls_of(message))
    if "inline" not in name:  # there the template's content holds its reasoning
        assert parsed.content == (message["content"] or "").rstrip()
        assert parsed.reasoning == message.get("reasoning_content", "")
    assert body(parsed.message(), tools) == body(message, tools)


def random_turn(draw: random.Random) -> dict:
    bits = ["a", " ", "\n", "<", "</", "<tool", "</par", "é", '"', "\\", "😀", "x>", "\t", "{", "1"]
    text = lambda most: "".join(draw.choices(bits, k=draw.randint(0, most)))
    message: dict = {"role": "assistant", "content": text(6).strip()}
    if reasoning := text(6):
        message["reasoning_content"] = reasoning if reasoning.strip() else "r"
    values = {
        "text": lambda: text(5) + draw.choice(["", "</parameter>", "</function>\n", "<think>"]),
        "count": lambda: draw.randint(-9, 9),
        "maybe": lambda: draw.choice([None, 1.5, 2]),
        "rows": lambda: draw.choice([[text(3)], {"k": None}, []]),
    }
    some = lambda: draw.sample(sorted(values), draw.randint(0, 4))
    calls = [
        {"name": "f", "arguments": {name: values[name]() for name in some()}}
        for _ in range(draw.randint(0, 2))
    ]
    return message | {"tool_calls": [{"function": call} for call in calls]} if calls else message


@pytest.mark.parametrize("seed", range(60))
def test_any_turn_survives_rendering_and_parsing(seed: int) -> None:
    message = random_turn(random.Random(seed))
    parsed = parse_turn(body(message), tools=TOOLS)
    assert not parsed.malformed
    assert parsed.reasoning == message.get("reasoning_content", "")
    assert parsed.content == message["content"]
    assert [(c.name, c.arguments) for c in parsed.calls] == list(calls_of(message))


@pytest.mark.parametrize("seed", range(150))
def test_any_cut_of_any_stream_gives_the_same_events(seed: int) -> None:
    draw = random.Random(seed)
    bits = [*TAGS, *("\n",) * 4, "f>", "text>", "count>", "x", " ", "<", "</tool", "é", "\ud83d"]
    bits += [THOUGHT_CALL, "<tool_call>\n<function=f>"]
    text = draw.choice(["", OPEN_CALL]) + "".join(draw.choices(bits, k=draw.randint(0, 30)))
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 9)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    options = {"thinking": draw.random() < 0.5, "tools": TOOLS, "strict": draw.random() < 0.3}
    whole = events([text], **options)
    assert events(parts, **options) == events(list(text), **options) == whole
    arguments = {e.index: e.text for e in whole if isinstance(e, CallArguments)}
    for event in whole:
        if isinstance(event, CallEnded):
            assert json.loads(arguments[event.index]) == event.arguments


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("<tool_call>\nhello\n</tool_call>", "no <function="),
        ("<tool_call></tool_call>", "no <function="),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "no <function="),
        ("<tool_call>\n<function=f\n</tool_call>", "name is not closed"),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", "name is not closed"),
        ("<tool_call>\n<function=f>\ntext\n</function>\n</tool_call>", "neither a parameter"),
        (OPEN_CALL + "1\n</tool_call>", "a parameter is not closed"),
        (OPEN_CALL + "1\n</parameter>\n</tool_call>", "neither a parameter"),
        (OPEN_CALL + "1\n</parameter>\n</function>\nx</tool_call>", "no </tool_call>"),
        (OPEN_CALL + "1\n</parameter>\n</function>\n", "the call is not closed"),
        (OPEN_CALL + "1", "the call is not closed"),
        ("<tool_call>\n<func", "the call is not closed"),
        (OPEN_CALL + "1\n</parameter>\n</funct", "the call is not closed"),
        (OPEN_CALL + "1\n</parameter>\n</function>\n</tool", "the call is not closed"),
        ("<tool_call>\nhello", "no <function="),  # broken before it was cut off
    ],
)
def test_a_malformed_call_is_an_event_with_its_text(written: str, reason: str) -> None:
    parsed = parse_turn(f"so:\n{written}")
    assert parsed.calls == () and parsed.content == "so:"
    (fault,) = parsed.malformed
    assert fault.text == written and reason in fault.reason


def test_a_call_after_a_malformed_one_is_read() -> None:
    good = "<tool_call>\n<function=f>\n</function>\n</tool_call>\n"
    parsed = parse_turn(f"<tool_call>\nnope <tool_call>{good[11:]}{good}<|im_end|>rest")
    assert len(parsed.malformed) == 1 and [call.index for call in parsed.calls] == [1, 2]
    assert parsed.closed and parsed.content == ""


@pytest.mark.parametrize(("text", "thinking"), [("<think>\nnever", False), ("never", True)])
def test_reasoning_that_is_never_closed_is_told(text: str, thinking: bool) -> None:
    for end, last in (("", []), ("<|im_end|>", [TurnEnded()])):
        told = [Reasoning("never"), Malformed("", "the reasoning is not closed"), *last]
        assert events([text + end], thinking=thinking) == told


def test_reasoning_may_speak_of_calls_and_content_of_tags() -> None:
    assert events(["a <tool_call> b</think>c</think>"], thinking=True) == [
        Reasoning("a <tool_call> b"),
        Content("c</think>"),
    ]


def test_a_call_ends_the_reasoning_unless_read_strictly() -> None:
    for rest, content in (("", ""), ("\n</think>\ndone", "done"), ("\n</think>", "")):
        turn = parse_turn(f"so:\n{THOUGHT_CALL}{rest}<|im_end|>", thinking=True, tools=TOOLS)
        assert (turn.reasoning, turn.content, turn.malformed) == ("so:", content, ())
        assert [call.arguments for call in turn.calls] == [{"text": "1"}] and turn.closed
    two = parse_turn(f"so:{THOUGHT_CALL}\n{THOUGHT_CALL}</think>", thinking=True)
    assert len(two.calls) == 2 and two.content == ""
    told = parse_turn("I write <tool_call>\n<function=f> here.</think>Yes.", thinking=True)
    assert told.content == "Yes." and not told.calls and len(told.malformed) == 1
    strict = parse_turn(f"so:\n{THOUGHT_CALL}<|im_end|>", thinking=True, strict=True)
    assert strict.reasoning == f"so:\n{THOUGHT_CALL}" and not strict.calls and strict.malformed


def test_no_half_of_a_surrogate_pair_leaves_the_parser() -> None:
    turn = parse_turn("<think>\n\ud83d</think>\udc00" + THOUGHT_CALL.replace("1", "\ud83d\ude00"))
    assert turn.reasoning == turn.content == "\ufffd"
    assert turn.calls[0].arguments == {"text": "\ufffd\ufffd"}


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("text", "3", "3"),
        ("count", "3", 3),
        ("count", "three", "three"),
        ("count", "9" * 5000, "9" * 5000),
        ("maybe", "None", None),
        ("maybe", "2.50", 2.5),
        ("rows", "[1, ", "[1, "),
        ("rows", "[" * 100_000, "[" * 100_000),
        ("other", "True", True),
        ("other", "true", "true"),
        ("other", "2.50", "2.50"),
    ],
)
def test_a_value_has_the_type_of_its_schema_or_stays_text(parameter, text, value) -> None:
    written = f"<tool_call>\n<function=f>\n<parameter={parameter}>\n{text}\n</parameter>\n"
    (call,) = parse_turn(f"{written}</function>\n</tool_call>", tools=TOOLS).calls
    assert call.arguments == {parameter: value}


def test_schemas_that_are_none_are_passed_over() -> None:
    for tools in ([{"name": 3}], [{"function": {"parameters": []}}], [{"parameters": {}}], []):
        written = (
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
        )
        assert parse_turn(written, tools=tools).calls[0].arguments == {"a": 1}


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "unit",
    ["x", "<", "\n", "<tool_call>", "<tool_call></tool_call>", "</parameter>", OPEN_CALL],
)
def test_a_megabyte_costs_no_more_than_its_length(unit: str) -> None:
    """Four times the text may cost ten times the time, not sixteen as a quadratic reader does."""

    def seconds(size: int) -> float:
        text = OPEN_CALL + unit * (size // len(unit))
        start = time.process_time()
        events([text[at : at + 64] for at in range(0, len(text), 64)], tools=TOOLS)
        return time.process_time() - start

    best = lambda size: min(seconds(size) for _ in range(2))  # another program may have the cache
    assert best(MEGABYTE) < 10 * best(MEGABYTE // 4) + 0.5
