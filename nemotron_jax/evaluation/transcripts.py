"""Every answer of a suite with what it was worth: a line of transcripts.jsonl each."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.data.json_lines import read_objects
from nemotron_jax.evaluation.answers import Answer, Message
from nemotron_jax.evaluation.suite import Score, Suite
from nemotron_jax.files import atomic_writer

Line = dict[str, Any]


@dataclasses.dataclass
class Transcripts:
    """The lines of one suite so far, each scored by the suite's own `score`."""

    suite: Suite
    lines: list[Line] = dataclasses.field(default_factory=list)

    def add(
        self,
        answer: Answer,
        *,
        task: str,
        index: int,
        gold: Any = None,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        sample: int = 0,
        seed: int = 0,
        score: Score | None = None,
        **more: Any,
    ) -> Line:
        """Score an answer and keep it; the line.

        `score` where it is known already; else the suite finds it. `task` names what is asked, the
        same for all samples of it and for every model: comparisons pair by it. `gold` and `more`
        are what the suite's `score` needs, JSON values only.
        """
        shown = {"prompt": prompt} if messages is None else {"messages": list(messages)}
        line = {"suite": self.suite.name, "task": task, "index": index, "sample": sample}
        line |= {"seed": seed, **shown, "answer": answer.text, "tokens": answer.tokens}
        line |= {"finish_reason": answer.finish_reason, "gold": gold, **more}
        if answer.reasoning:
            line["reasoning"] = answer.reasoning
        if answer.calls:
            line["calls"] = list(answer.calls)
        if answer.error:
            line["infra_error"] = answer.error
        if score is not None and not answer.error:
            line |= dataclasses.asdict(score)
        self.lines.append(line if "score" in line else scored(self.suite, line))
        return self.lines[-1]


def scored(suite: Suite, line: Line) -> Line:
    """The line with `score`, `reason` and `answered`; a failure of the machinery has no score."""
    if line.get("infra_error"):
        return line | {"score": None, "reason": line["infra_error"], "answered": False}
    assert suite.score is not None, f"suite {suite.name} keeps transcripts and has no score"
    return line | dataclasses.asdict(suite.score(line))


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line; the file is whole or absent."""
    with atomic_writer(path) as out:
        for line in lines:
            out.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_lines(path: Path) -> list[Line]:
    """The lines that a file holds; damaged ones are left out, no file has none."""
    return [line for _, line in read_objects(path) if line is not None]
