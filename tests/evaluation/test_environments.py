"""What a model solves: oracles solve everything, by level, and what is kept can be scored again."""

import dataclasses
import json

import pytest

from nemotron_jax.environments.catalogue import find
from nemotron_jax.environments.turns import Turn
from nemotron_jax.evaluation import environments
from nemotron_jax.evaluation.answers import Answer
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.environments import Options, levels_of, measure, score, summarise
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.transcripts import Transcripts


class Server:
    """Answers as the oracles of some environments; wrong, cut off or failing where it is told."""

    def __init__(self, options, wrong=(), cut=(), failing=()):
        self.turns, self.marks = {}, {"wrong": wrong, "cut": cut, "failing": failing}
        self.asked = []
        for level in levels_of(Subject(None, None, None, url="http://x"), options):
            for index in range(options.tasks):
                task = level.task(0, index)
                turns = [Turn.of(turn) for turn in find(task.environment).oracle(task)]
                self.turns[json.dumps(task.messages, default=list)] = (task, turns)

    def ask(self, asks):
        self.asked.append(len(asks))
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask):
        said = json.dumps(ask.messages, default=list)[:-1]
        opening = next(key for key in self.turns if said.startswith(key[:-1]))
        task, turns = self.turns[opening]
        before = sum(message["role"] == "assistant" for message in ask.messages)
        if task.index in self.marks["failing"]:
            return Answer(finish_reason="error", error="status 500")
        if task.index in self.marks["wrong"]:
            return Answer("no idea", 2, message={"role": "assistant", "content": "no idea"})
        turn = turns[before]
        cut = task.index in self.marks["cut"]
        text = turn.text[:1] if cut else turn.text
        message = turn.message() if not cut else {"role": "assistant", "content": text}
        return Answer(text, 3, "length" if cut else "stop", message=message)


def played(options, **marks):
    subject = Subject(None, None, None, url="http://x")
    server = Server(options, **marks)
    progress = Progress("environments")
    context = Context(subject, Transcripts(environments.SUITE), progress, url=server)
    return measure(context, options), context.transcripts.lines, server


OPTIONS = Options(names=("arithmetic", "lookup/1"), tasks=6)


def test_oracles_solve_every_level() -> None:
    result, lines, server = played(OPTIONS)
    assert result.values["reward"].mean == 1.0 and result.values["reward"].n == 18
    levels = ["arithmetic/level0", "arithmetic/level3", "lookup/level1"]
    assert [name for name in result.values if name.startswith("pass@1/")] == [
        f"pass@1/{name}" for name in levels
    ]
    assert {line["finish_reason"] for line in lines} == {"stop"}
    assert len({line["task"] for line in lines}) == 18
    assert max(server.asked) == 18, "tasks are played side by side"


def test_what_goes_wrong_is_counted_and_told_apart() -> None:
    options = dataclasses.replace(OPTIONS, names=("arithmetic",), levels=(0,), k=2)
    result, lines, _ = played(options, wrong=(0, 1), cut=(2,), failing=(3,))
    assert result.values["reward"].n == 5 and result.values["reward"].mean == pytest.approx(0.4)
    assert result.counts.truncated == 2 and result.counts.infra_errors == 2
    assert result.values["pass@2"].mean == result.values["pass^2"].mean == pytest.approx(0.4)
    assert [line["score"] for line in lines if line["index"] == 3] == [None, None]
    json.dumps(lines)  # plain values


def test_transcripts_are_scored_again_as_they_were() -> None:
    result, lines, _ = played(OPTIONS, wrong=(1,), cut=(2,))
    kept = [json.loads(json.dumps(line)) for line in lines]
    assert [score(line).score for line in kept] == [line["score"] for line in lines]
    assert summarise(kept, OPTIONS) == result
    kept[0]["messages"][-1]["content"] = "something else"
    assert score(kept[0]).score == 0.0


def test_options_name_environments_levels_and_how_they_are_played() -> None:
    assert Options(names="sql").names == ("sql",) and Options(levels=2).levels == (2,)
    subject = Subject(None, None, None, url="http://x")
    found = lambda **options: [
        (one.environment.name, one.level) for one in levels_of(subject, Options(**options))
    ]
    assert found() == [("arithmetic", 0), ("arithmetic", 3)]
    assert found(levels="all") == [("arithmetic", n) for n in range(4)]
    assert found(names=("lookup",), levels=(1,)) == [("lookup", 1)]
    for wrong, words in (
        ({"names": ("arithmetik",)}, "no environment"),
        ({"levels": (9,)}, "levels 0 to 3"),
        ({"names": ("arithmetic/7",)}, "level must be 0 to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            found(**wrong)
    for wrong in ({"tasks": 0}, {"k": 0}, {"thinking": 1}, {"temperature": -1.0}, {"levels": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**wrong)
