"""What the model's own drafts are worth: how many stand, by kind of text and number of drafts.

What they cost is measured by suite `speed`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.config.checks import at_least_one, check, is_integer, not_negative
from nemotron_jax.config.engine import MOST_DRAFTS
from nemotron_jax.data.corpus import Corpus
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.statistics import value_over
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import (
    Plot,
    Result,
    Suite,
    Table,
    Value,
    as_tuples,
    once_each,
)
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.types import Batch

COLUMNS = ("text", "k", "mean length", "low", "high", "drafts accepted", "verifications")
PROMPT_TOKENS = 64  # of held-out text
TEACHER_ROWS = 32  # of held-out text, at most: a mean over thousands of places
_SEED_APART = 1_000_003  # between the draws of two seeds: more than there are prompts
HELD_OUT, COPY = "held_out", "copy"
# Beginnings that a model of any tokenizer can go on with, by what is asked of it. SPEED-Bench's own
# texts may not be shipped; its categories are of these kinds.
TEXTS: Mapping[str, tuple[str, ...]] = {
    "code": (
        "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot =",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self,",
        "import json\n\ndef read(path):\n    with open(path) as file:\n",
        "for name, value in sorted(table.items()):\n    print(",
    ),
    "prose": (
        "The old lighthouse had stood on the cliff for a hundred years, and",
        "In the morning the market was full of people, and the first thing that",
        "Dear Sir or Madam, I am writing to you because",
        "The history of the steam engine begins with",
    ),
    "numbers": (
        "1, 2, 3, 4, 5, 6, 7, 8,",
        "2 + 2 = 4\n3 + 3 = 6\n4 + 4 = 8\n5 + 5 =",
        "The sum of the first ten even numbers is",
        "x = 3\ny = 4\nx * y =",
    ),
    "structured": (
        '{"name": "Ada", "age": 36, "languages": ["',
        "<ul>\n  <li>first</li>\n  <li>",
        "name,age,city\nAda,36,London\nAlan,41,",
        "# Title\n\n## First part\n\n- one\n- two\n- ",
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Numbers of drafts `k`, `prompts` of each kind of text, `new_tokens` of each; `temperature` 0
    is greedy, which repeats itself in small models and flatters drafts."""

    k: tuple[int, ...] = (1, 3, 5)
    prompts: int = 16
    temperature: float = 1.0
    new_tokens: int = 128

    def __post_init__(self) -> None:
        as_tuples(self, "k")
        ok = once_each(self.k) and all(is_integer(k) and 1 <= k <= MOST_DRAFTS for k in self.k)
        check(self, "k", ok, f"must be numbers from 1 to {MOST_DRAFTS}, each once, as in (1,3)")
        at_least_one(self, "prompts", "new_tokens")
        not_negative(self, "temperature")


def measure(context: Context, options: Options) -> Result:
    """Mean length: tokens that a verification gives, the model's own counted; prompts are the
    independent things.

    Teacher-forced, the draft of depth d at each place of held-out text stands with probability
    sum(min(p, q)) of what model and draft give the same next token; the mean length of k drafts is
    1 + sum over d <= k of the mean product of the first d.
    """
    context.subject.require_mtp()
    prompts = prompts_of(context.subject, options.prompts)
    found = {}
    for number, k in enumerate(options.k):
        context.progress.at(number, len(options.k), "numbers of drafts")
        found[k] = drafted(context, prompts, k, options)
    values, rows = {}, []
    for k, requests in found.items():
        values[f"mean_length_{k}"] = length_of([r for part in requests.values() for r in part])
        for name, part in requests.items():
            value = values[f"mean_length_{k}/{name}"] = length_of(part)
            accepted = sum(request.accepted_drafts for request in part)
            verified = sum(request.verifications for request in part)
            low, high = value.interval or (None, None)
            rate = accepted / (k * max(verified, 1))
            rows.append((name, k, value.mean, low, high, rate, verified))
    total = sum(row[-1] for row in rows)
    values["verifications"] = Value(total, better="", unit="verifications")
    tables = [Table("By kind of text and drafts", COLUMNS, tuple(rows)), _by_position(found)]
    curves = {name: [] for name in prompts}
    for name, k, *numbers in rows:
        curves[name].append((k, *numbers[:3]))
    if context.subject.config is not None:
        batches = _teacher_batches(context.subject)
        deepest = max(options.k)
        overlaps = teacher_forced(context.model, batches, deepest)
        forced = [(k, acceptance_length(overlaps[:, :k])) for k in range(1, deepest + 1)]
        curves["teacher-forced"] = forced
        values |= {
            f"teacher_forced_{k}": Value(v, n=len(overlaps), unit="tokens") for k, v in forced
        }
    return Result(
        values,
        tables=tuple(tables),
        plots=(_plot(curves),),
        headline=(f"mean_length_{max(options.k)}",),
    )


def length_of(requests: Sequence[Request]) -> Value:
    """Tokens a verification gave, with prompts as the independent things; 1 is plain decoding."""
    items = {
        f"prompt_{hash_of(request.prompt)}": (
            float(request.verifications + request.accepted_drafts),
            float(request.verifications),
        )
        for request in requests
        if request.verifications
    }
    return value_over(items, unit="tokens", chance=1.0)


def hash_of(prompt: Sequence[int]) -> str:
    """A name of a prompt that is the same everywhere."""
    return format(functools.reduce(lambda h, t: (h * 1_000_003 + t + 1) % 2**48, prompt, 7), "012x")


def drafted(
    context: Context, prompts: Mapping[str, Sequence[tuple[int, ...]]], k: int, options: Options
) -> dict[str, list[Request]]:
    """Finished requests of each kind of text, drafted k tokens a round."""
    lockstep = Lockstep(context.model, context.execution, speculative=k)
    wanted = Wanted(options.new_tokens, temperature=options.temperature)
    # No two prompts share draws, of one seed or of two: they count as independent things.
    seeds = itertools.count(context.seed * _SEED_APART, options.prompts)
    seeded = lambda: dataclasses.replace(wanted, seed=next(seeds) % 2**32)
    found = {name: submitted(lockstep, part, seeded()) for name, part in prompts.items()}
    lockstep.run()
    return found


def submitted(
    lockstep: Lockstep, prompts: Sequence[tuple[int, ...]], wanted: Wanted
) -> list[Request]:
    """A request of each prompt, with draws of its own."""
    seeded = lambda n: dataclasses.replace(wanted, seed=(wanted.seed + n) % 2**32)
    return [lockstep.submit(prompt, seeded(n))[0] for n, prompt in enumerate(prompts)]


def prompts_of(subject: Subject, count: int) -> dict[str, list[tuple[int, ...]]]:
    """So many different prompts of each kind of text, as tokens; those of held-out text where the
    subject has some."""
    tokenizer = subject.tokenizer
    found = {name: _varied(tokenizer, texts, count) for name, texts in TEXTS.items()}
    if subject.config is not None:
        passages = _passages(subject.corpus, 2 * count)
        found[HELD_OUT] = passages[:count]
        again = lambda passage: (*passage, *passage[: len(passage) // 4])
        found[COPY] = [again(passage) for passage in passages[-count:]]
    return found


def _varied(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[tuple[int, ...]]:
    """The texts, and again after each other's, until there are enough."""
    whole = [texts[n % len(texts)] if n < len(texts) else _joined(texts, n) for n in range(count)]
    return [tuple(ids) for ids in tokenizer.encode_batch(whole)]


def _joined(texts: Sequence[str], number: int) -> str:
    """Two texts after a number of their own, so that no prompt comes twice."""
    first = texts[(number // len(texts)) % len(texts)]
    return f"{number}\n{first}\n\n{texts[number % len(texts)]}"


def _passages(corpus: Corpus, count: int) -> list[tuple[int, ...]]:
    """Beginnings of held-out documents, and further on where there are few of them."""
    held_out, size = corpus.held_out, PROMPT_TOKENS
    starts = [
        int(start) + offset
        for offset in range(0, 16 * size, size)
        for start, end in zip(held_out.offsets[:-1], held_out.offsets[1:], strict=True)
        if start + offset + size <= end
    ]
    if len(starts) < count:
        raise ValueError(
            f"suite 'acceptance': the held-out text has {len(starts)} passages of {size} tokens "
            f"and {count} are needed; give more text, or fewer prompts"
        )
    return [tuple(held_out.tokens[at : at + size].tolist()) for at in starts[:count]]


def _teacher_batches(subject: Subject) -> list[Batch]:
    data = subject.config.data
    rows = min(held_out_row_count(subject.corpus, data), TEACHER_ROWS)
    return list(held_out_batches(subject.corpus, data, 0, rows))


def teacher_forced(
    model: Nemotron, batches: Sequence[Batch], deepest: int
) -> Float[np.ndarray, "N k"]:
    """By place and depth, the chance that a draft stands where all that follows is the text."""
    found = [np.asarray(_overlaps(model, batch, deepest)) for batch in batches]
    whole = [_whole(np.asarray(batch.segment_ids), deepest) for batch in batches]
    return np.concatenate([o[mask] for o, mask in zip(found, whole, strict=True)])


def acceptance_length(overlaps: Float[np.ndarray, "N k"]) -> float:
    """Tokens that a verification gives on average, the model's own counted."""
    return 1 + float(np.cumprod(overlaps, axis=1).mean(axis=0).sum())


@functools.partial(jax.jit, static_argnames="deepest")
def _overlaps(model: Nemotron, batch: Batch, deepest: int) -> Float[Array, "B T k"]:
    """By depth d, sum(min(p, q)) of the token d + 1 further on; meaningless at a document's end."""
    hidden = model(batch.tokens, segment_ids=batch.segment_ids).hidden
    probabilities = jax.nn.softmax(model.logits(hidden))
    found = []
    for depth in range(1, deepest + 1):
        drafted = model.mtp(hidden, batch.tokens, depth, batch.segment_ids).hidden
        q = jax.nn.softmax(model.logits(drafted))
        p = jnp.pad(probabilities[:, depth:], ((0, 0), (0, depth), (0, 0)))
        found.append(jnp.sum(jnp.minimum(p, q), axis=-1))
    return jnp.stack(found, axis=-1)


def _whole(segments: Int[np.ndarray, "B T"], deepest: int) -> np.ndarray:
    """Places whose next `deepest` tokens stand in the same row and document."""
    later = np.pad(segments[:, deepest:], ((0, 0), (0, deepest)))
    return (segments > 0) & (later == segments)


def _by_position(found: Mapping[int, Mapping[str, Sequence[Request]]]) -> Table:
    """The chance that a draft stands when those before it did."""
    rows = []
    for k, requests in found.items():
        places = [p for part in requests.values() for r in part for p in r.places]
        counts = np.bincount([p for p in places if p >= 0], minlength=2 * (k + 1))
        accepted = [int(counts[0] + counts[1]), *(int(c) for c in counts[1 : 2 * k : 2])]
        rows += [(k, n, accepted[n] / max(accepted[n - 1], 1)) for n in range(1, k + 1)]
    title = "Chance that a draft is accepted when those before it were"
    return Table(title, ("k", "position", "chance"), tuple(rows))


def _plot(curves: Mapping[str, Sequence[tuple]]) -> Plot:
    return Plot(
        name="acceptance_length",
        title="Tokens that one verification gives",
        x_label="drafts k",
        y_label="tokens",
        curves=curves,
        baselines={"plain decoding": 1.0},
    )


def _ready(subject: Subject, options: Options) -> None:
    subject.require_mtp()
    prompts_of(subject, options.prompts)


SUITE = Suite(
    name="acceptance",
    about="how many tokens a verification of the model's own drafts gives",
    options=Options,
    measure=measure,
    ready=_ready,
    one_process=True,
)
