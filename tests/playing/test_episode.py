"""Turns that break the chat format are found, and reasoning that does not end breaks nothing."""

import pytest

from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.data.chat.render import END
from nemotron_jax.environments import registry
from nemotron_jax.playing.episode import is_well_formed, turn_span

TOOLS = registry["arithmetic"].split(0, "train", 0, level=1).tools


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Answer: 4", True),
        (
            "\n<tool_call>\n<function=calc>\n<parameter=e>\n1+1\n</parameter>\n</function>\n</tool_call>\n",
            True,
        ),
        ("\n<tool_call>\n<function=calc>\n1+1\n</tool_call>\n", False),
        ("4</tool_call>", False),
        ("<function_call>calc</function_call>", False),
        ("4</think>5", False),
        ("<think>4</think>5", True),  # a turn may open its reasoning itself
    ],
)
def test_turns_that_break_the_format_are_found(text, right) -> None:
    assert is_well_formed(parse_turn(text + END, tools=TOOLS, strict=True)) is right


CALL = "<tool_call>\n<function=calc>\n<parameter=e>\n1+1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "right", "unclosed", "cut_call"),
    [
        (f"I add.\n</think>\nAnswer: 4{END}", True, False, False),
        (f"I add.\n</think>\n{CALL}\n{END}", True, False, False),
        (f"</think>{END}", True, False, False),
        ("", True, True, False),
        ("I add and add and", True, True, False),
        (f"I add and add{END}", True, True, False),
        ("I add.\n</thin", True, True, False),
        ("I add.\n</think>\nThe answer is", True, False, False),
        (f"The tag <think> is a token.\n</think>\nAnswer: 4{END}", True, False, False),
        ("<think>\nI add", True, True, False),
        (f"<think>a <think>b\n</think>\nAnswer: 4{END}", False, False, False),
        ("<think>a <think>b", False, True, False),
        (f"a <tool_call> b\n</think>\nAnswer: 4{END}", False, False, False),
        (f"a {CALL} b", False, True, False),
        (f"a </function_call> b\n</think>\n4{END}", False, False, False),
        (f"I add.\n</think>\n4 </think> 5{END}", False, False, False),
        (f"I add.\n</think>\n<think>4</think>{END}", False, False, False),
        (f"I add.\n</think>\n4</tool_call>{END}", False, False, False),
        (f"I add.\n</think>\n<function_call>f</function_call>{END}", False, False, False),
        (f"I add.\n</think>\n<tool_call>\ncalc 1+1\n</tool_call>{END}", False, False, False),
        (f"I add.\n</think>\n<tool_call>\n<function=calc>\n{END}", False, False, False),
        ("I add.\n</think>\n<tool_call>\n<function=calc>\n", False, False, True),
        ("I add.\n</think>\n<tool_call>\ncalc 1+1", False, False, False),
        ("a <tool_call> b\n</think>\n<tool_call>\n<func", False, False, False),
    ],
)
def test_a_thought_that_does_not_end_breaks_nothing(text, right, unclosed, cut_call) -> None:
    turn = parse_turn(text, thinking=True, tools=TOOLS, strict=True)
    span = turn_span(turn, 0, 1, True, 0)
    assert (span.well_formed, span.unclosed, span.cut_call) == (right, unclosed, cut_call)


def test_a_right_turn_that_is_cut_off_is_broken_only_within_a_call() -> None:
    whole = f"I add.\n</think>\nSo:\n{CALL}\n{CALL}\n"
    thought = whole.index("</think>") + len("</think>")
    opened = {
        n
        for n in range(len(whole))
        if whole[:n].count("<tool_call>") > whole[:n].count("</tool_call>")
    }
    for stop in range(len(whole)):
        cut = parse_turn(whole[:stop], thinking=True, tools=TOOLS, strict=True)
        span = turn_span(cut, 0, 1, False, 0)
        assert span.unclosed == (stop < thought), whole[:stop]
        assert span.cut_call == (stop in opened) == (not span.well_formed), whole[:stop]
