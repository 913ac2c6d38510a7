"""What a suite is: a name, options, what it needs, and a function from a context to a result.

Nothing here imports jax: options are checked before anything slow begins.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Cell = str | int | float | None


class Unavailable(Exception):
    """Why a suite cannot run here (a package, a part of the model, a server), as a sentence.

    The suite fails where it was asked for by name and is skipped under `all`; others go on.
    """


class Unanswered(Unavailable):
    """Why a server gave nothing to measure. The suite fails under `all` too: it has all parts."""


@dataclasses.dataclass(frozen=True)
class Value:
    """One number to compare models by, and what to read it against.

    `interval` is of 95 %; `n` counts independent things (documents, tasks), each an entry of
    `items`: its amount and its size. `mean` is the sum of amounts over the sum of sizes.
    `statistics.value_over` makes a Value of items. `better`: "higher", "lower", or "" for a fact
    that is no merit.
    """

    mean: float
    interval: tuple[float, float] | None = None
    n: int = 1
    unit: str = ""
    chance: float | None = None
    untrained: float | None = None  # the framework fills it in
    better: str = "higher"
    items: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Answers that were cut off, that gave nothing to score, and failures of the machinery, which
    are left out of every mean."""

    truncated: int = 0
    no_answer: int = 0
    infra_errors: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows below named columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves by name, each of points (x, y) or (x, y, low, high), whose bands are drawn, and
    horizontal lines to read them against."""

    name: str  # of the file
    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, ...]]]
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What a suite found.

    Names of values that depend on the clock end in `_per_second`, and tables that do stand in
    `timed`: all else is the same for the same seed. `headline` names the values that the report
    begins with; `says` are sentences for there, made from the headline where there are none.
    """

    values: Mapping[str, Value]
    counts: Counts = Counts()
    tables: tuple[Table, ...] = ()
    timed: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    headline: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Score:
    """What an answer is worth, from 0 to 1, and why; `answered` is false where it gave nothing to
    score, which is worth 0."""

    score: float
    reason: str = ""
    answered: bool = True


def as_tuples(options: Any, *fields: str) -> None:
    """Make each named field of an Options a tuple: a single value is one of itself."""
    for field in fields:
        value = getattr(options, field)
        several = isinstance(value, list | tuple)
        object.__setattr__(options, field, tuple(value) if several else (value,))


def once_each(values: Sequence[Any]) -> bool:
    """Whether there is a value, and none twice."""
    return bool(values) and all(values.count(value) == 1 for value in values)


def _always(subject: Any, options: Any) -> None:
    """Nothing is needed."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark. Its module has one as SUITE, and a line in `suites.SUITES`.

    `options` is a frozen dataclass of literals with defaults, which raises ValueError on
    construction for values out of range. `needs`: a "model" in memory, the "url" of a server, or
    "either". `ready` is called before anything is loaded: ValueError for what was asked wrongly
    (nothing runs then), Unavailable for what is not there.

    `longest`: the most tokens that one of its requests has, prompt and answer; None where it makes
    none. The one generator of all suites is made for the longest of them. `untrained`: the options
    with which a model of the same shape that was never trained is measured too, its means being
    each value's `untrained`; None where that says nothing.

    `one_process`: it times this process's devices, which several processes would not do alike.

    A suite with transcripts has `score`, of one line, and `summarise`, of all scored lines, and
    its `measure` ends with `summarise(context.transcripts.lines, options)`: `eval.py rescore` does
    the same with what is in the file.
    """

    name: str
    about: str  # one sentence: what is measured
    options: type
    measure: Callable[[Any, Any], Result]  # of a Context and options
    needs: str = "model"
    ready: Callable[[Any, Any], None] = _always  # of a Subject and options
    longest: Callable[[Any, Any], int] | None = None  # of a Subject and options
    untrained: Callable[[Any], Any] | None = None
    score: Callable[[Mapping[str, Any]], Score] | None = None
    summarise: Callable[[Sequence[Mapping[str, Any]], Any], Result] | None = None
    one_process: bool = False
