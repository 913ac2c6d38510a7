"""A model in lower formats side by side: text, next tokens, and what it writes."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.checks import at_least_one, check
from nemotron_jax.config.execution import Execution
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.divergence import divergence
from nemotron_jax.evaluation.held_out import token_nats
from nemotron_jax.evaluation.perplexity import by_document, documents_of
from nemotron_jax.evaluation.rounded import FORMATS, LIMITS, change, rounded
from nemotron_jax.evaluation.statistics import value_over
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Result, Suite, Table, Value, as_tuples, once_each
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_directory import CONFIG
from nemotron_jax.types import Batch

COLUMNS = (
    "format",
    "bits per byte",
    "KL, nats",
    "same token, text",
    "same token, answers",
    "tokens an answer",
    "worst matrix",
    "is off by",
)
PROMPT_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """`formats` are names of FORMATS, or directories with the model as it was quantised; `tokens`
    of held-out text are scored, and `answers` prompts continued greedily by `new_tokens`."""

    formats: tuple[str, ...] = FORMATS
    tokens: int = 16_384
    answers: int = 16
    new_tokens: int = 128

    def __post_init__(self) -> None:
        as_tuples(self, "formats")
        at_least_one(self, "tokens", "answers", "new_tokens")
        ok = once_each(self.formats) and all(
            isinstance(one, str) and (one in FORMATS or (Path(one) / CONFIG).is_file())
            for one in self.formats
        )
        rule = f"must be of {', '.join(FORMATS)}, or directories of the quantised model, each once"
        check(self, "formats", ok, rule)


@dataclasses.dataclass(frozen=True)
class Form:
    """The model in one format, and how it runs."""

    name: str
    model: Nemotron
    execution: Execution
    limit: float  # of the change of a matrix that the format explains


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of text, and by scored token its document and bytes."""

    batches: Sequence[Batch]
    document: Int[np.ndarray, "N"]
    bytes: Int[np.ndarray, "N"]

    @property
    def scored(self) -> Bool[np.ndarray, "rows T"]:
        """Which tokens count: those with a target inside their document."""
        return np.concatenate([np.asarray(b.weights[..., 0]) for b in self.batches]) > 0


def measure(context: Context, options: Options) -> Result:
    """Each format against the model as it was loaded: bits per byte and KL on held-out text, the
    share of tokens where both hold the same one likeliest, on that text and on the model's own
    greedy answers, and how long each format's own answers are."""
    own = Form("as loaded", context.model, context.execution, 0.0)
    text = held_out_text(context.subject, options.tokens)
    prompts = _prompts(context.subject, options.answers)
    answers = greedy(own, prompts, options.new_tokens)
    pages = [_Pages(own, text.batches), _Pages(own, _answer_batches(prompts, answers))]
    values, rows = {}, []
    for number, name in enumerate(options.formats):
        context.progress.at(number, len(options.formats), "formats")
        form = form_of(context, name)
        found = _compared(form, own, text, pages)
        lengths = [len(answer) for answer in greedy(form, prompts, options.new_tokens)]
        named = {f"prompt_{n:03d}": (float(count), 1.0) for n, count in enumerate(lengths)}
        found["tokens_an_answer"] = value_over(named, unit="tokens", better="")
        worst, off = change(own.model, form.model).worst
        found["worst_matrix_error"] = Value(off, better="lower", chance=form.limit)
        short = Path(name).name
        values |= {f"{key}/{short}": value for key, value in found.items()}
        keys = ("bits_per_byte", "kl", "same_token", "same_token_of_answers", "tokens_an_answer")
        rows.append((short, *(found[key].mean for key in keys), worst, off))
    return Result(
        values,
        tables=(Table("Formats side by side", COLUMNS, tuple(rows)),),
        says=tuple(_sentence(row, values) for row in rows),
    )


def _sentence(row: tuple, values: dict[str, Value]) -> str:
    name, _, kl, same, *_, worst, off = row
    limit = values[f"worst_matrix_error/{name}"].chance
    text = f"{name}: KL {kl:.2g} nats, the same likeliest token at {same:.1%} of places"
    if limit and off > limit:
        return (
            f"{text}; {worst} is off by {off:.2g} of its size, more than rounding explains "
            f"({limit:.2g}): a scale of it is WRONG."
        )
    return f"{text}."


def form_of(context: Context, name: str) -> Form:
    """The model in a format, or as a directory holds it."""
    if name not in FORMATS:
        return Form(name, context.subject.load(Path(name)), context.execution, LIMITS["nvfp4"])
    execution = context.execution
    if name in ("float32", "bfloat16"):
        execution = dataclasses.replace(execution, compute_dtype=name)
    return Form(name, rounded(context.model, name), execution, LIMITS[name])


def held_out_text(subject: Subject, tokens: int) -> Text:
    """Whole rows of held-out text with at least so many tokens, or all of it."""
    data, corpus = subject.config.data, subject.corpus
    rows = min(held_out_row_count(corpus, data), -(-tokens // data.sequence_length))
    batches = list(held_out_batches(corpus, data, 0, rows))
    targets = np.concatenate([batch.targets[..., 0] for batch in batches])
    scored = np.concatenate([batch.weights[..., 0] for batch in batches]) > 0
    bytes_of = corpus.byte_lengths[targets[scored]].astype(np.int64)
    return Text(batches, documents_of(corpus, scored), bytes_of)


class _Pages:
    """Rows of text with the reference's hidden states, kept on the host."""

    def __init__(self, form: Form, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.hidden = [np.asarray(_hidden(form, batch)) for batch in batches]

    def against(self, own: Form, form: Form) -> tuple[np.ndarray, np.ndarray]:
        """KL and equality of the likeliest token at every place."""
        kl, same = [], []
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            other = _hidden(form, batch)
            pair = (own.model, hidden), (form.model, other)
            found = divergence(*pair, execution=form.execution)
            kl.append(found[0])
            same.append(found[1])
        return np.concatenate(kl), np.concatenate(same)


def _compared(form: Form, own: Form, text: Text, pages: Sequence[_Pages]) -> dict[str, Value]:
    nats = [token_nats(form.model, b, execution=form.execution) for b in text.batches]
    bits = np.concatenate(nats).astype(np.float64)[text.scored] / math.log(2)
    kl, same = (found[text.scored] for found in pages[0].against(own, form))
    ones = np.ones(len(bits))
    of_documents = lambda amount: by_document(text.document, amount, ones)
    _, same_of_answers = pages[1].against(own, form)
    spoken = np.concatenate([np.asarray(b.weights[..., 0]) for b in pages[1].batches]) > 0
    answers = {
        f"prompt_{n:03d}": (float(same_of_answers[n, own_places].sum()), float(own_places.sum()))
        for n, own_places in enumerate(spoken)
        if own_places.any()
    }
    return {
        "bits_per_byte": value_over(
            by_document(text.document, bits, text.bytes), unit="bits", better="lower"
        ),
        "kl": value_over(of_documents(kl), unit="nats", better="lower"),
        "same_token": value_over(of_documents(same.astype(np.float64)), unit="share"),
        "same_token_of_answers": value_over(answers, unit="share"),
    }


def greedy(form: Form, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[list[int]]:
    """Each prompt's greedy continuation, up to the end of a document."""
    lockstep = Lockstep(form.model, form.execution)
    wanted = Wanted(new_tokens, stop_tokens=(form.model.config.eos_token,))
    requests = [lockstep.submit(prompt, wanted)[0] for prompt in prompts]
    lockstep.run()
    return [request.tokens for request in requests]


def _prompts(subject: Subject, count: int) -> list[tuple[int, ...]]:
    """Beginnings of held-out documents."""
    held_out = subject.corpus.held_out
    bounds = zip(held_out.offsets[:-1], held_out.offsets[1:], strict=True)
    texts = [held_out.tokens[a : min(b - 1, a + PROMPT_TOKENS)].tolist() for a, b in bounds]
    return [tuple(text) for text in texts if text][:count]


def _answer_batches(
    prompts: Sequence[tuple[int, ...]], answers: Sequence[Sequence[int]]
) -> list[Batch]:
    """Prompts with their answers in one batch, whose weights are 1 where a token of an answer
    comes next."""
    texts = [(*p, *a) for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    tokens, segments = np.zeros((2, len(texts), width), np.int32)
    weights = np.zeros((len(texts), width, 1), np.float32)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        tokens[row, : len(text)] = text
        segments[row, : len(text)] = 1
        weights[row, len(prompt) - 1 : len(text) - 1] = 1
    targets = np.roll(tokens, -1, axis=1)[..., None]
    none = np.zeros((len(texts), width, 0), np.int32)
    return [Batch(tokens, targets, none, segments, weights)]


def _hidden(form: Form, batch: Batch) -> Float[Array, "B T D"]:
    return _states(form.model, batch.tokens, batch.segment_ids, execution=form.execution)


@functools.partial(jax.jit, static_argnames="execution")
def _states(model: Nemotron, tokens: Array, segments: Array, *, execution: Execution) -> Array:
    return model(tokens, segment_ids=segments, execution=execution).hidden


def _ready(subject: Subject, options: Options) -> None:
    subject.require_config("quantization")
    subject.corpus  # noqa: B018  # see perplexity


SUITE = Suite(
    name="quantization",
    about="what lower formats of the weights cost",
    options=Options,
    measure=measure,
    ready=_ready,
)
