"""Loss by position in a long text: whether what stands far back is used."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nemotron_jax.config.checks import at_least_one, check
from nemotron_jax.data.packing import HELD_OUT_KEY, DocumentTokens, Stream
from nemotron_jax.evaluation.answers import Ask
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.statistics import value_over
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Plot, Result, Suite, Table, Unavailable

COLUMNS = ("from token", "to token", "nats per token", "low", "high", "texts")


@dataclasses.dataclass(frozen=True)
class Options:
    """`rows` texts of `length` tokens, which are read as one document each; their positions are
    told apart in `buckets` of equal size."""

    length: int = 1024
    rows: int = 8
    buckets: int = 8

    def __post_init__(self) -> None:
        at_least_one(self, "length", "rows", "buckets")
        rule = "must be at most length - 1: the first token is not predicted"
        check(self, "buckets", self.buckets < self.length, rule)


def measure(context: Context, options: Options) -> Result:
    """Held-out documents end to end, cut in texts; documents that follow each other in one text
    are of one kind, so that falling loss says that the beginning helps."""
    texts = long_texts(context.subject.corpus.held_out, options)
    asks = [Ask(prompt=text, max_new_tokens=1, prompt_logprobs=True) for text in texts]
    answers = context.ask(asks)
    if failed := [answer.error for answer in answers if answer.error]:
        raise Unavailable(failed[0])
    if short := [a for a in answers if len(a.prompt_logprobs) != options.length - 1]:
        raise Unavailable(
            f"{len(short)} of {len(answers)} texts came back without the log-probability of every "
            "prompt token; ask a server that gives them"
        )
    return result_of(-np.array([answer.prompt_logprobs for answer in answers]), options)


def long_texts(held_out: DocumentTokens, options: Options) -> list[tuple[int, ...]]:
    """The beginning of the held-out stream in texts of so many tokens, as many as it has whole."""
    count = min(options.rows, held_out.token_count // options.length)
    if not count:
        raise ValueError(
            f"suite 'longnll': the held-out text has {held_out.token_count:,} tokens, fewer than "
            f"length={options.length}; give a smaller one"
        )
    tokens = Stream(held_out, HELD_OUT_KEY).read(0, count * options.length).tokens
    return [tuple(row) for row in tokens.reshape(count, options.length).tolist()]


def result_of(nats: Float[np.ndarray, "rows T"], options: Options) -> Result:
    """Values by bucket, and how much less the last costs than the first, text by text."""
    parts = np.array_split(np.arange(nats.shape[1]), options.buckets)
    names = [f"text_{number:04d}" for number in range(len(nats))]

    def over(columns: Sequence[int]) -> dict[str, tuple[float, float]]:
        sums = nats[:, columns].sum(axis=1).tolist()
        return {name: (value, float(len(columns))) for name, value in zip(names, sums, strict=True)}

    whole = value_over(over(range(nats.shape[1])), unit="nats", better="lower")
    buckets = [value_over(over(part)) for part in parts]
    falls = nats[:, parts[-1]].mean(axis=1) - nats[:, parts[0]].mean(axis=1)
    fall = {name: (value, 1.0) for name, value in zip(names, falls.tolist(), strict=True)}
    rows, points = [], []
    for part, value in zip(parts, buckets, strict=True):
        low, high = value.interval or (None, None)
        rows.append((int(part[0]) + 1, int(part[-1]) + 1, value.mean, low, high, value.n))
        points.append((float(part.mean()) + 1, value.mean, low, high))
    return Result(
        values={
            "nats_per_token": whole,
            "last_minus_first": value_over(fall, unit="nats", better="lower", chance=0.0),
        },
        tables=(Table("By position", COLUMNS, tuple(rows)),),
        plots=(
            Plot(
                name="loss_by_position",
                title="Held-out loss by position in a long text",
                x_label="tokens before the predicted one",
                y_label="loss (nats per token)",
                curves={"model": tuple(points)},
            ),
        ),
        headline=("last_minus_first",),
    )


def _ready(subject: Subject, options: Options) -> None:
    subject.require_config("longnll")
    long_texts(subject.corpus.held_out, options)


SUITE = Suite(
    name="longnll",
    about="how the loss falls along a long text",
    options=Options,
    measure=measure,
    needs="either",
    ready=_ready,
    longest=lambda subject, options: options.length + 1,
    untrained=lambda options: options,
)
