"""Environments out of JSONL files in NeMo Gym's row format.

    {"responses_create_params": {"input": [{"role": "user", "content": …}], "tools": […]}, …}

What the row holds beside says how it is judged: `expected_action` (one call, or words),
`schema_str` (JSON that fits, its content not known), `options` with `expected_answer` (a letter),
or `expected_answer` alone (a number, or a text compared without case and outer marks). These keys
may also stand in `verifier_metadata`. A row that needs a judge model or code is not supported.
"""

import codecs
import functools
from pathlib import Path
from typing import Any

from nemotron_jax.environments.answers import final_answer, number, plain
from nemotron_jax.environments.base import (
    Draft,
    Environment,
    Session,
    Task,
    Verdict,
    side,
    split_name,
)
from nemotron_jax.environments.choice import letter_of
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import canonical, check_schema, example, faults, read_json
from nemotron_jax.environments.single_step import same_arguments
from nemotron_jax.environments.structured import read_answer
from nemotron_jax.environments.turns import Turn, calling

_KEYS = ("expected_action", "schema_str", "expected_answer", "options")


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
        letter = letter_of(final_answer(turn.text), expected["options"])
        return letter == expected["answer"].upper()

    def _answer(self, expected: str, turn: Turn) -> bool:
        answer, value = final_answer(turn.text), number(expected)
        if value is not None:
            return number(answer) == value
        return answer is not None and plain(answer) == plain(expected)


class Rows(Environment):
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
        self._drafts: dict[str, list[Draft]] = {"train": [], "held_out": []}
        # Lines end at \n alone: JSON strings may hold the other ends of line that Python knows.
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                draft = _draft(read_json(line.decode("utf-8")))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if unsupported == "raise":
                    raise ValueError(
                        f"{path}, line {line_number}: {error!r}; mend it or give unsupported='skip'"
                    ) from error
                self.skipped += 1
                continue
            self._drafts[side(draft.messages)].append(draft)

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
            return [calling(expected["name"], **expected["arguments"])]
        if kind == "schema":
            return [canonical(example(expected))]
        return [f"Answer: {expected['answer'] if kind == 'letter' else expected}"]


def _draft(row: dict) -> Draft:
    parameters = row["responses_create_params"]
    given = row.get("verifier_metadata") or {}
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
        return "schema", schema
    answer = known["expected_answer"]
    if not isinstance(answer, str | int | float):
        raise ValueError(f"none of {', '.join(_KEYS[:3])} says how to judge it")
    if options := known["options"]:
        texts = [str(text) for option in options for text in option.values()]
        return "letter", {"answer": str(answer), "options": texts}
    return "answer", str(answer)


def _items(given: str | list) -> list[dict]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _message(item: dict) -> dict:
    """A message of chat form from one of the Responses form, calls and their results included."""
    if item.get("type") == "function_call":
        return calling(item["name"], **read_json(item["arguments"])).message()
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
