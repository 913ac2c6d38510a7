"""Environments out of JSONL files in NeMo Gym's row format.

    {"responses_create_params": {"input": [{"role": "user", "content": …}], "tools": […]}, …}

What the row holds beside says how it is judged: `expected_action` (one call, or words),
`schema_str` (JSON that fits, its content not known), `options` with `expected_answer` (a letter, in
a box where `grading_mode` wants one), or `expected_answer` alone (equivalence.py). These keys may
also stand in `verifier_metadata`. A row that needs a judge model, code or a template is not
supported, nor is one whose own right answer earns nothing.
"""

import codecs
import collections
import functools
import itertools
from pathlib import Path
from typing import Any

from nemotron_jax.environments.answers import final_answer
from nemotron_jax.environments.base import (
    Draft,
    Environment,
    Session,
    Task,
    Verdict,
    play,
    side,
    split_name,
)
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.equivalence import same_answer
from nemotron_jax.environments.fences import read_answer
from nemotron_jax.environments.letters import LETTERS, letter_of
from nemotron_jax.environments.schema import (
    canonical,
    check_schema,
    example,
    faults,
    read_json,
    same_arguments,
)
from nemotron_jax.environments.turns import ToolCall, Turn

_KEYS = ("expected_action", "schema_str", "expected_answer", "options", "grading_mode",
         "schema_type")  # fmt: skip
# Forms of NeMo Gym's multiple choice, and whether the letter has to stand in a box.
_GRADING_MODES = {
    "strict_single_letter_boxed": True,
    "lenient_boxed": True,
    "lenient_answer_colon": False,
}
# Keys that make the judgement depend on what is not here; a row that fills one is refused.
_NOT_SUPPORTED = (
    *("template_metadata", "output_regex", "rubric", "rubrics", "judge_prompt", "judge_template"),
    *("grading_function", "unit_tests", "test_cases", "instruction_id_list", "tolerance"),
)
# Names under which an option gives its letter and its text.
_LABELS = ("label", "letter", "key", "id", "option_id")
_TEXTS = ("text", "content", "value", "option", "answer")
_NAMES = (_LABELS, _TEXTS)
# The oracle is played on so many rows as they are read, then on one in so many: a row takes about
# 0.2 ms.
CHECKED_ROWS, CHECKED_SHARE = 20_000, 50


class RowSession(Session):
    def call(self, name: str, arguments: Any) -> str:
        self.calls.append((name, arguments, "noted"))  # foreign tools are compared, never run
        return "noted"

    def score(self) -> Verdict:
        kind, turn = self.task.data["kind"], self.turns[0]
        right = getattr(self, f"_{kind}")(self.task.data["expected"], turn)
        return Verdict(float(right), answer=turn.text[:200])

    def _action(self, expected: dict, turn: Turn) -> bool:
        if expected.get("type") == "message":
            return not turn.calls and bool(turn.text.strip())
        if len(turn.calls) != 1 or turn.calls[0].name != expected["name"]:
            return False
        return same_arguments(turn.calls[0].arguments, expected["arguments"])

    def _schema(self, expected: dict, turn: Turn) -> bool:
        try:
            return not faults(read_answer(turn.text), expected)
        except ValueError:
            return False

    def _letter(self, expected: dict, turn: Turn) -> bool:
        if expected["boxed"] and "\\boxed" not in turn.text:
            return False
        return letter_of(final_answer(turn.text), expected["options"]) == expected["answer"]

    def _answer(self, expected: str, turn: Turn) -> bool:
        return same_answer(expected, final_answer(turn.text))


class RowTasks(Environment):
    """The rows of one file. Each belongs to the split that its messages' hash says."""

    reward, counterpart, levels = "by the row's own keys", "any with such rows", 1
    session = RowSession

    def __init__(
        self, path: str | Path, name: str | None = None, unsupported: str = "raise"
    ) -> None:
        """unsupported: "raise" at a row that cannot be judged here, or "skip" and count it."""
        if unsupported not in ("raise", "skip"):
            raise ValueError(f"Rows: unsupported={unsupported!r} is neither 'raise' nor 'skip'")
        self.name = name or Path(path).stem
        self.summary = f"Rows of {Path(path).name}"
        self.skipped = 0
        self.reasons: collections.Counter[str] = collections.Counter()  # of what was skipped
        self._drafts: dict[str, list[Draft]] = {"train": [], "held_out": []}
        # Lines end at \n alone: JSON strings may hold the other ends of line that Python knows.
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                draft = _draft(read_json(line.decode("utf-8")))
                if len(self) < CHECKED_ROWS or not len(self) % CHECKED_SHARE:
                    self._check(draft)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if unsupported == "raise":
                    raise ValueError(
                        f"{path}, line {line_number}: {error!r}; mend it or give unsupported='skip'"
                    ) from error
                self.skipped += 1
                self.reasons[f"{error!r:.120}"] += 1
                continue
            self._drafts[side(draft.messages)].append(draft)

    def _check(self, draft: Draft) -> None:
        """Raise ValueError for a row whose own right answer earns less than 1."""
        task = Task("row", self.name, tuple(draft.messages), tuple(draft.tools), draft.data, 0)
        verdict = play(self, task, self.oracle(task))
        if verdict.reward < 1 or verdict.infra_error:
            raise ValueError(
                f"its own right answer earns {verdict.infra_error or verdict.reward}: "
                f"{draft.data['expected']!r:.80}"
            )

    def __len__(self) -> int:
        return sum(map(len, self._drafts.values()))

    def draw(self, draws: Draws, level: int) -> Draft:
        return draws.choice([draft for drafts in self._drafts.values() for draft in drafts])

    def split(self, seed: int, split: str, index: int, *, level: int | None = None) -> Task:
        """Row after row in an order of the seed's own; after the last it begins again."""
        split = split_name(split, self.name)
        drafts = self._drafts[split]
        if not drafts:
            raise ValueError(f"{self.name}: no row belongs to {split}; give a longer file")
        draft = drafts[self._order(seed, split)[index % len(drafts)]]
        shown = tuple(draft.messages), tuple(draft.tools)
        name = f"{self.name}/{split}/{seed}/{index}"
        return Task(name, self.name, *shown, draft.data, 0, seed, split, index)

    @functools.cache  # noqa: B019  an environment lives as long as the program
    def _order(self, seed: int, split: str) -> list[int]:
        return Draws(self.name, seed, split).shuffled(range(len(self._drafts[split])))

    def oracle(self, task: Task) -> list[Turn | str]:
        kind, expected = task.data["kind"], task.data["expected"]
        if kind == "action":
            if expected.get("type") == "message":
                return ["Gladly."]
            return [Turn(calls=(ToolCall(expected["name"], expected["arguments"]),))]
        if kind == "schema":
            return [canonical(example(expected))]
        if kind == "letter":
            letter = expected["answer"]
            return [f"\\boxed{{{letter}}}" if expected["boxed"] else f"Answer: {letter}"]
        line = f"Answer: {expected}"
        # A text of several lines, or one that looks like a list, stands in a box alone.
        return [line if same_answer(expected, final_answer(line)) else f"\\boxed{{{expected}}}"]


def _draft(row: dict) -> Draft:
    parameters = row["responses_create_params"]
    given = row.get("verifier_metadata") or {}
    if unknown := [key for key in _NOT_SUPPORTED if row.get(key) or given.get(key)]:
        raise ValueError(f"{unknown[0]!r} says how to judge it, and is not supported")
    known = {key: row.get(key, given.get(key)) for key in _KEYS}
    kind, expected = _judged(known)
    messages = [_message(item) for item in _items(parameters["input"])]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no user message")
    tools = tuple(_spec(spec) for spec in parameters.get("tools") or ())
    return Draft(messages, {"kind": kind, "expected": expected}, tools)


def _judged(known: dict) -> tuple[str, Any]:
    """How a row is judged, and against what."""
    if action := known["expected_action"]:
        if action.get("type") == "message":
            return "action", action
        arguments = action["arguments"]
        arguments = read_json(arguments) if isinstance(arguments, str) else arguments
        return "action", {"name": action["name"], "arguments": arguments}
    if schema := known["schema_str"]:
        schema = read_json(schema) if isinstance(schema, str) else schema
        check_schema(schema)
        if known["schema_type"] not in (None, "json"):
            raise ValueError(f"schema_type={known['schema_type']!r} is not supported; only json is")
        return "schema", schema
    answer = known["expected_answer"]
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"none of {', '.join(_KEYS[:3])} says how to judge it")
    mode = known["grading_mode"]
    if mode is not None and (mode not in _GRADING_MODES or not known["options"]):
        raise ValueError(f"grading_mode={mode!r} is not one of {sorted(_GRADING_MODES)} of options")
    if not known["options"]:
        return "answer", str(answer)
    texts = _option_texts(known["options"])
    letter = letter_of(str(answer), texts)
    if letter is None:
        raise ValueError(f"expected_answer={answer!r} is none of {len(texts)} options")
    return "letter", {"answer": letter, "options": texts, "boxed": bool(_GRADING_MODES.get(mode))}


def _option_texts(options: Any) -> list[str]:
    """The options' texts in the order of their letters; ValueError unless these go on from A."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(options, dict) and all(isinstance(each, list) for each in options.values()):
        labels, texts = (_first(options, names) for names in _NAMES)
        pairs = list(zip(labels, texts, strict=True))
    elif isinstance(options, dict):
        pairs = list(options.items())
    else:
        for letter, option in zip(itertools.chain(LETTERS, itertools.repeat("?")), options):
            if not isinstance(option, dict):
                pairs.append((letter, option))
            elif (text := _first(option, _TEXTS)) is not None:
                label = _first(option, _LABELS)
                pairs.append((letter if label is None else label, text))
            else:
                pairs += option.items()
    named = {str(label).strip("(). ").upper(): text for label, text in pairs}
    letters = LETTERS[: len(pairs)]
    if len(pairs) < 2 or "".join(sorted(named)) != letters:
        raise ValueError(f"options named {[str(label) for label, _ in pairs]} are not A, B, …")
    texts = [named[letter] for letter in letters]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise ValueError("options that are neither texts nor numbers")
    return [str(text) for text in texts]


def _first(values: dict, names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if name in values), None)


def _items(given: str | list) -> list[dict]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _message(item: dict) -> dict:
    """A message of chat form from one of the Responses form, calls and their results included."""
    if item.get("type") == "function_call":
        return Turn(calls=(ToolCall(item["name"], read_json(item["arguments"])),)).message()
    if item.get("type") == "function_call_output":
        return {"role": "tool", "content": item["output"]}
    content = item.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return {"role": item["role"], "content": content}


def _spec(spec: dict) -> dict:
    """A tool in chat form; the Responses form has no inner object."""
    if "function" in spec:
        return spec
    function = {key: spec[key] for key in ("name", "description", "parameters") if key in spec}
    return {"type": "function", "function": {"parameters": {"type": "object"}} | function}
