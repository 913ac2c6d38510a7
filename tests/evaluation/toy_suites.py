"""Suites without a model, for tests of what runs them."""

import dataclasses
import os
import signal

from nemotron_jax.config.checks import at_least_one
from nemotron_jax.evaluation.answers import Answer
from nemotron_jax.evaluation.statistics import counts_of, items_of, value_over
from nemotron_jax.evaluation.suite import Result, Score, Suite, Unanswered, Unavailable, Value

FATAL = "TOY_SUITE_THAT_KILLS"
LOG = "TOY_SUITES_LOG"  # a file that gets a line for each suite that runs


@dataclasses.dataclass(frozen=True)
class Options:
    tasks: int = 4

    def __post_init__(self) -> None:
        at_least_one(self, "tasks")


def measure(context, options):
    name = context.transcripts.suite.name
    with open(os.environ[LOG], "a") as log:
        log.write(name + "\n")
    if os.environ.get(FATAL) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    for index in range(options.tasks):
        answer = Answer(text=str(index % 3), tokens=1, error="gone" if index == 3 else "")
        more = {"gold": str(index % 2), "prompt": f"{index}?"}
        context.transcripts.add(answer, task=f"task_{index}", index=index, **more)
    return summarise(context.transcripts.lines, options)


def score(line):
    return Score(float(line["answer"] == line["gold"]), "compared", bool(line["answer"]))


def summarise(lines, options):
    accuracy = value_over(items_of(lines), unit="share", chance=0.5)
    values = {"accuracy": accuracy, "speed_tokens_per_second": Value(1.0)}
    return Result(values, counts_of(lines), headline=("accuracy",))


def fails(context, options):
    raise {"bad": ValueError, "absent": Unavailable, "silent": Unanswered}.get(
        context.transcripts.suite.name, ZeroDivisionError
    )("of no use\nhere")


def _suite(name, what=measure, **fields):
    with_lines = {"score": score, "summarise": summarise} if what is measure else {}
    return Suite(name, f"what {name} is", Options, what, needs="either", **with_lines, **fields)


FIRST, SECOND, THIRD = _suite("first"), _suite("second"), _suite("third")
BAD, ABSENT, BROKEN = _suite("bad", fails), _suite("absent", fails), _suite("broken", fails)
SILENT = _suite("silent", fails)
