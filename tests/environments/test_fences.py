"""Fenced blocks are read as CommonMark reads them; edits and fences in a time that is linear."""

import itertools
import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nemotron_jax.environments import coding, play, registry
from nemotron_jax.environments.answers import MAX_ANSWER, final_answer, number
from nemotron_jax.environments.base import MAX_TEXT
from nemotron_jax.environments.coding import code_of
from nemotron_jax.environments.equivalence import same_answer
from nemotron_jax.environments.families.bug_repair import MAX_EDITS, edit, patched
from nemotron_jax.environments.fences import fenced, read_answer
from nemotron_jax.environments.letters import letter_of
from nemotron_jax.environments.sandbox import Result
from nemotron_jax.environments.units import quantity

CODE = "def solve(xs):\n    return xs\n"


INFOS = ("", "python", " python", "python3.11", "{python}", 'python title="a.py"', "JSON")


def test_a_block_is_found_however_it_is_fenced() -> None:
    ways = itertools.product(
        ("```", "````", "~~~", "~~~~~"), INFOS, ("", "  ", "    ", "\t"), ("\n", "\r\n")
    )
    for marks, info, indent, end in ways:
        lines = ["Here it is:", "", marks + info, *CODE.splitlines(), marks, "", "It does nothing."]
        text = end.join(indent + line for line in lines)
        assert fenced(text) == [CODE], text
        assert code_of(text) == CODE


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("````\n```\na\n```\n````", ["```\na\n```\n"]),  # fewer marks do not close
        ("```\n~~~\n```", ["~~~\n"]),  # nor do other ones
        ("```\na\n``` b\n```", ["a\n``` b\n"]),  # nor marks with words behind
        ("```\na\n`````", ["a\n"]),  # more do
        ("```\na\n    ```\n```", ["a\n    ```\n"]),  # further in than three columns do not
        ("```a``` b", []),  # code within a line
        ("``\na\n``", []),
        ("```python\na", ["a\n"]),  # left open: to the end
        ("```python\na```", ["a\n"]),
        ("```\na\n```\n\n~~~\nb\n~~~", ["a\n", "b\n"]),
        ("```\n```", [""]),
    ],
)
def test_blocks_by_commonmark(text: str, blocks: list[str]) -> None:
    assert fenced(text) == blocks


@pytest.mark.parametrize("item", ["- ", "* ", "1. ", "12) ", "  - ", "-   "])
@pytest.mark.parametrize("marks", ["```", "~~~~"])
def test_a_fence_may_begin_an_item_of_a_list(item: str, marks: str) -> None:
    inner = "".join(" " * len(item) + line + "\n" for line in [*CODE.splitlines(), marks])
    assert fenced(f"Two steps:\n{item}{marks}python\n{inner}- Run it.\n") == [CODE]


def test_two_blocks_are_no_code() -> None:
    assert code_of(f"```\n{CODE}```\n~~~\n{CODE}~~~") == ""
    assert code_of(CODE) == CODE


@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "```JSON\n{}\n```",
                                  "``` json5\n{}\n```",
                                  "Here it is:\n```json\n{}\n```\nAsk for more.", "```json{}```",
                                  "1. So:\n   ~~~\n   {}\n   ~~~"])  # fmt: skip
def test_json_is_read_from_its_block(form: str) -> None:
    value = {"a": ["[" * 40, "```"], "b": None}
    assert read_answer(form.replace("{}", json.dumps(value))) == value


@pytest.mark.parametrize(
    "text", ["It is {}.", "```\n{}\n```\n```\n{}\n```", "```\n{}\n{}\n```", ""]
)
def test_json_in_prose_or_twice_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        read_answer(text.replace("{}", '{"a": 1}'))


@pytest.mark.parametrize("wrap", ["{}", "So:\n```\n{}\n```", "1. So:\n   ```diff\n{}\n   ```"])
def test_edits_are_read_in_and_out_of_a_block(wrap: str) -> None:
    one = edit("b", "B")
    if wrap.startswith("1."):
        one = "\n".join(f"   {line}" for line in one.split("\n"))
    text = wrap.replace("{}", one)
    assert patched("a\nb\n", text) == patched("a\nb\n", text.replace("\n", "\r\n")) == "a\nB\n"
    assert patched("b\n" * MAX_EDITS, edit("x", "b") * MAX_EDITS) is None


def repeated(unit: str) -> str:
    return (unit * (MAX_TEXT // len(unit) + 1))[:MAX_TEXT]


# What a model that repeats itself writes; LONG of a whole turn, SHORT within an answer.
LONG = ["<<<<<<< SEARCH\nx\n=======\n", "<<<<<<< SEARCH\n", "=======\n", "```a\n", "~~~~\n", "`",
        "\n",
        "<<<<<<< SEARCH\nx\n=======\ny\n>>>>>>> REPLACE\n", "[", '\\"', " ", "\\boxed{",
        "\\boxed", "9",
        "**a** ", "Answer: 1\n", "The answer is ", "#### 1\n"]  # fmt: skip
SHORT = ["{", "\\frac", "\\frac{", "\\sqrt[", "\\text{", "^", "(", "|", "1,", "9", "/", "10**",
         "-", "x=",
         "m/s ", "kg*", "x+", "x^", "9^", "9!", "(1,", "1 or ", "B) ", "\u00b2",
         "\ud800"]  # fmt: skip


def seconds(work: Callable[[], None]) -> float:
    """CPU-seconds of this thread; the better of two tries, where other things happen to fall into
    the first, such as a collection of garbage."""
    tries = []
    while len(tries) < 2 and (not tries or tries[0] > 0.2):
        began = time.thread_time()
        work()
        tries.append(time.thread_time() - began)
    return min(tries)


def test_readers_of_text_take_linear_time() -> None:
    """A whole verdict has one CPU-second; a reader alone stays far below."""
    tasks = [(registry[name], registry[name].split(0, "train", 0)) for name in NAMES]
    for place, unit in enumerate(LONG):
        text = repeated(unit)
        environment, task = tasks[place % len(tasks)]

        def read(text=text, environment=environment, task=task) -> None:
            fenced(text)
            patched("a\nb\n", text)
            with pytest.raises(ValueError):
                read_answer(text)
            verdict = play(environment, task, [text])
            assert verdict.reward == 0 and verdict.infra_error is None

        assert seconds(read) < 1, unit


def test_readers_of_answers_take_linear_time() -> None:
    """Answers are short; what nests or multiplies in them is read in no time all the same."""
    for unit in SHORT:
        text = "5" + (unit * MAX_ANSWER)[: MAX_ANSWER - 1]

        def read(text=text) -> None:
            final_answer(f"Answer: {text}")
            number(text), quantity(text), letter_of(text, ["x", text[:50]])
            same_answer("x^2+1", text), same_answer("(1, 2)", text)

        assert seconds(read) < 0.5, unit


NAMES = ("arithmetic", "equations", "science_units", "multiple_choice", "graph_walk")
HOSTILE = ("[" * 980 + "]" * 980, '{"a":' * 985 + "1" + "}" * 985, "9" * 5000, "NaN", "1e999",
           '"\\ud800"', '{"a": 1, "a": 1}', "[" * 10**5, "", "null, 1")  # fmt: skip


def test_what_a_program_writes_for_its_result_is_wrong_and_no_failure(monkeypatch) -> None:
    """A program reaches the descriptor of its results, so a line of them can be anything."""
    lines = [f'{{"value": {text}}}' for text in HOSTILE]
    lines += ["3", "[]", '"value"', '["value"]', "null", '{"value": 1, "b": 2}', "{", "\x00"]
    result = Result("\n".join(lines), "", 0, "exit", 0.0, 0.0)
    monkeypatch.setattr(coding, "sandbox", lambda: SimpleNamespace(run=lambda *a, **k: result))
    values = coding.call_all("", [("solve", [])] * (len(lines) + 2))
    for right in (1, None, [], "x", [[1]]):
        assert not any(coding.agree(values, [right] * len(values)))
