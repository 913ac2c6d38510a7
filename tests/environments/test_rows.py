"""RowTasks in NeMo Gym's format become tasks with the same properties as all others."""

import json
import pathlib

import pytest

from nemotron_jax.environments import Task, calling, play
from nemotron_jax.environments.check import check
from nemotron_jax.environments.rows import RowTasks


def row(text: str | list, tools: list | None = None, **rest: object) -> dict:
    given = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return {"responses_create_params": {"input": given, "tools": tools or []}, **rest}


CALL = {"type": "function_call", "name": "find", "arguments": '{"city": "Oslo"}'}
FLAT_TOOL = {
    **{"type": "function", "name": "find", "description": "", "strict": True},
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
KINDS = {
    "number": (row("What is 2+2?", expected_answer="4"), "\\boxed{4.0}", "\\boxed{5}"),
    "name": (row("Capital?", verifier_metadata={"expected_answer": "Paris"}), "paris.", "Rome"),
    "letter": (row("Which?", options=[{"A": "x"}, {"B": "y"}], expected_answer="B"), "B) y", "A"),
    "schema": (row("JSON?", schema_str=SCHEMA, schema_type="json"), '{"a": 3}', '{"a": "3"}'),
    "action": (row("Find Oslo", [FLAT_TOOL], expected_action=CALL), calling("find", city="oslo"),
               calling("find", city="Rome")),
    "words": (row("Thanks", [FLAT_TOOL], expected_action={"type": "message"}), "Gladly.",
              calling("find", city="Oslo")),
}  # fmt: skip


def write(path: pathlib.Path, rows: list) -> pathlib.Path:
    path.write_text("\n".join(json.dumps(one) for one in rows), "utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_judged_by_its_keys(kind: str, tmp_path: pathlib.Path) -> None:
    one, right, wrong = KINDS[kind]
    environment = RowTasks(write(tmp_path / "rows.jsonl", [one]), "mine")
    split = "train" if environment._drafts["train"] else "held_out"
    task = environment.split(0, split, 0)
    assert play(environment, task, [right]).reward == 1
    assert play(environment, task, environment.oracle(task)).reward == 1
    assert play(environment, task, [wrong]).reward == 0
    assert play(environment, task, [""]).reward == 0


def test_rows_pass_the_check_of_every_environment(tmp_path: pathlib.Path) -> None:
    rows = [row(f"What is {n}+{n}?", expected_answer=str(2 * n)) for n in range(40)]
    environment = RowTasks(write(tmp_path / "sums.jsonl", rows))
    assert environment.name == "sums" and len(environment) == 40
    assert not check(environment, tasks=8, fuzz=1).faults


def test_every_row_of_a_split_comes_once_before_any_comes_again(tmp_path: pathlib.Path) -> None:
    rows = [row(f"{n}?", expected_answer=str(n)) for n in range(40)]
    environment = RowTasks(write(tmp_path / "rows.jsonl", rows))
    count = len(environment._drafts["train"])
    first = [environment.split(3, "train", index).content_hash for index in range(count)]
    assert len(set(first)) == count < 40
    assert environment.split(3, "train", count).content_hash == first[0]


def test_a_history_in_responses_form_becomes_chat_messages(tmp_path: pathlib.Path) -> None:
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "Find Oslo"}]},
        CALL | {"call_id": "1"},
        {"type": "function_call_output", "call_id": "1", "output": "Norway"},
    ]
    one = row(history, [FLAT_TOOL], expected_answer="Norway")
    environment = RowTasks(write(tmp_path / "rows.jsonl", [one]))
    (draft,) = environment._drafts["train"] + environment._drafts["held_out"]
    assert draft.messages == [
        {"role": "user", "content": "Find Oslo"},
        calling("find", city="Oslo").message(),
        {"role": "tool", "content": "Norway"},
    ]
    assert draft.tools[0]["function"]["name"] == "find"


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"responses_create_params": {}}', json.dumps(row("judge me")),
            json.dumps(row([], expected_answer="1"))],
)  # fmt: skip
def test_a_row_that_cannot_be_judged_is_named_or_skipped(bad: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("1?", expected_answer="1")) + "\n" + bad, "utf-8")
    with pytest.raises(ValueError, match="rows.jsonl, line 2: .*unsupported='skip'"):
        RowTasks(path)
    environment = RowTasks(path, unsupported="skip")
    assert len(environment) == 1 and environment.skipped == 1


def test_lines_end_at_line_feeds_alone(tmp_path: pathlib.Path) -> None:
    """JSON strings hold the line ends of Unicode as they are; a bad row counts once."""
    text = "2+2?" + "".join(map(chr, (0x2028, 0x2029, 0x85))) + "A number."
    rows = [row(text, expected_answer="4"), row("1+3?", expected_answer="4")]
    lines = [json.dumps(one, ensure_ascii=False).encode() for one in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n\n")
    assert len(RowTasks(path)) == 2
    path.write_bytes(b"\n".join([*lines, b'{"a\xe2\x80\xa8b"', b'"\xff"', lines[0]]))
    environment = RowTasks(path, unsupported="skip")
    assert len(environment) == 3 and environment.skipped == 2
    with pytest.raises(ValueError, match="line 3"):
        RowTasks(path)


TWO = [{"A": "Rome"}, {"B": "Paris"}]
SHAPES = (TWO, {"A": "Rome", "B": "Paris"}, [{"A": "Rome", "B": "Paris"}], ["Rome", "Paris"],
          [{"label": "A", "text": "Rome"}, {"label": "B", "text": "Paris"}],
          [{"key": "(b)", "value": "Paris"}, {"key": "(a)", "value": "Rome"}],
          {"label": ["A", "B"], "text": ["Rome", "Paris"]})  # fmt: skip


def only(environment: RowTasks) -> Task:
    split = "train" if environment._drafts["train"] else "held_out"
    return environment.split(0, split, 0)


def test_options_are_read_in_every_shape(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    for options in SHAPES:
        environment = RowTasks(write(path, [row("?", options=options, expected_answer="B")]))
        task = only(environment)
        assert task.data["expected"]["options"] == ["Rome", "Paris"], options
        for text, right in (("B) Paris", 1), ("Paris", 1), ("A", 0), ("B) Rome", 0)):
            assert play(environment, task, [f"Answer: {text}"]).reward == right
    many = [{chr(65 + n): f"option {n}"} for n in range(26)]
    environment = RowTasks(write(path, [row("?", options=many, expected_answer="Z")]))
    assert play(environment, only(environment), ["\\boxed{\\text{Z}}"]).reward == 1
    mode = {"options": TWO, "expected_answer": "B", "grading_mode": "strict_single_letter_boxed"}
    environment = RowTasks(write(path, [row("?", **mode)]))
    task = only(environment)
    assert play(environment, task, ["\\boxed{B}"]).reward == 1
    assert play(environment, task, ["Answer: B"]).reward == 0


UNJUDGEABLE = (
    {"expected_answer": ""}, {"expected_answer": " "}, {"expected_answer": "$$"},
    {"expected_answer": "x" * 3000}, {"expected_answer": None}, {"expected_answer": ["4"]},
    {"expected_answer": "4", "grading_mode": "by_heart"},
    {"expected_answer": "4", "template_metadata": {"output_regex": "(.*)*"}},
    {"expected_answer": "4", "verifier_metadata": {"unit_tests": ["assert 1"]}},
    {"options": TWO, "expected_answer": "C"}, {"options": TWO, "expected_answer": ""},
    {"options": [{"1": "Rome"}, {"2": "Paris"}], "expected_answer": "1"},
    {"options": [{"B": "Rome"}, {"C": "Paris"}], "expected_answer": "B"},
    {"options": [{"A": "Rome"}, {"A": "Paris"}], "expected_answer": "A"},
    {"options": [{"A": "Rome"}], "expected_answer": "A"},
    {"options": [str(n) for n in range(27)], "expected_answer": "A"},
    {"options": TWO, "expected_answer": "B", "grading_mode": "by_heart"},
    {"schema_str": {"type": "array", "minItems": 2, "items": {"const": 1}, "uniqueItems": True}},
    {"schema_str": SCHEMA, "schema_type": "yaml"},
    {"schema_str": {"type": "integer", "minimum": 3, "maximum": 2}},
    {"expected_answer": "<tool_call>{}</tool_call>"},
)  # fmt: skip


def test_a_row_that_nobody_can_win_is_refused_with_its_reason(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    for rest in UNJUDGEABLE:
        write(path, [row("1?", expected_answer="1"), row("?", **rest)])
        with pytest.raises(ValueError, match="rows.jsonl, line 2: .*unsupported='skip'"):
            RowTasks(path)
        environment = RowTasks(path, unsupported="skip")
        assert len(environment) == 1 and environment.skipped == 1 == len(environment.reasons), rest


def test_a_call_may_have_arguments_of_any_name(tmp_path: pathlib.Path) -> None:
    call = {"type": "function_call", "name": "f", "arguments": '{"name": "x", "text": "y"}'}
    history = [{"role": "user", "content": "?"}, call]
    environment = RowTasks(write(tmp_path / "rows.jsonl", [row(history, expected_action=call)]))
    task = only(environment)
    assert play(environment, task, environment.oracle(task)).reward == 1
