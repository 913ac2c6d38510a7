"""What it costs to keep less: divergence from float32 and bits per byte by the cache's formats."""

import dataclasses
import math

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.config.cache import KV_FORMATS, STATE_FORMATS, CacheConfig
from nemotron_jax.config.checks import at_least_one, check
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.data.packing import DocumentTokens
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.store import FlatModel, PrefillRows, Store, prefill, score
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.divergence import divergence
from nemotron_jax.evaluation.statistics import value_over
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Result, Suite, Table, Unavailable
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import current_mesh

COLUMNS = ("keys and values", "states", "KL to float32, nats", "low", "high", "more bits per byte")
MOST_NATS = 1e-3  # of a format whose loss nobody would see: a hundredth of a bit per byte's noise
EXACT = CacheConfig("float32")
ROWS = 8  # documents that are read at a time
_PAGE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """The first `tokens` of so many held-out `documents` are read."""

    documents: int = 16
    tokens: int = 256

    def __post_init__(self) -> None:
        at_least_one(self, "documents", "tokens")
        check(self, "tokens", self.tokens > 1, "must be at least 2: the first is not predicted")


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents of the same number of tokens, padded at the end."""

    tokens: Int[np.ndarray, "N T"]
    lengths: Int[np.ndarray, "N"]

    @classmethod
    def of(cls, held_out: DocumentTokens, options: Options) -> "Texts":
        """The beginnings of the first documents of more than one token."""
        bounds = zip(held_out.offsets[:-1], held_out.offsets[1:], strict=True)
        texts = [held_out.tokens[a : min(b, a + options.tokens)] for a, b in bounds if b - a > 1]
        texts = texts[: options.documents]
        tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        return cls(tokens, np.array(list(map(len, texts)), np.int32))


def measure(context: Context, options: Options) -> Result:
    """Documents read token by token as decoding does, so that states are rounded after each.

    Each row of the table differs in one format from float32; documents are the independent things.
    """
    if (mesh := current_mesh()) is not None and mesh.size > 1:
        raise Unavailable("formats of the cache are compared on one device; leave --mesh out")
    corpus, execution = context.subject.corpus, context.execution
    texts = Texts.of(corpus.held_out, options)
    model = for_decoding(context.model)
    formats = [CacheConfig(kv=kv) for kv in KV_FORMATS if kv not in ("auto", "float32")]
    formats += [CacheConfig("float32", states) for states in STATE_FORMATS[1:]]
    exact = read_texts(model, texts, EXACT)
    nats = _nats(model, exact, texts)
    bytes_of = corpus.byte_lengths[texts.tokens].astype(np.float64)
    values, rows = {}, []
    for number, one in enumerate(formats):
        context.progress.at(number, len(formats), "formats")
        hidden = read_texts(model, texts, one)
        kl, _ = divergence((model, exact), (model, hidden), execution=execution)
        more = (_nats(model, hidden, texts) - nats) / math.log(2)
        name = one.kv if one.states == "float32" else f"states_{one.states}"
        apart = value_over(
            _items(kl, np.ones_like(kl), texts, first=0),
            unit="nats",
            better="lower",
            chance=MOST_NATS,
        )
        extra = value_over(_items(more, bytes_of, texts), unit="bits", better="lower")
        values[f"kl/{name}"], values[f"{name}_more_bits_per_byte"] = apart, extra
        low, high = apart.interval or (None, None)
        rows.append((one.kv, one.states, apart.mean, low, high, extra.mean))
    return Result(
        values,
        tables=(Table("Formats of the cache", COLUMNS, tuple(rows)),),
        says=tuple(_sentence(kv, values[f"kl/{kv}"].mean) for kv in ("bfloat16", KV_FORMATS[-1])),
    )


def _sentence(name: str, nats: float) -> str:
    good = "no more than" if nats <= MOST_NATS else "MORE than"
    return f"Keys and values in {name} move the next token by {nats:.2g} nats, {good} {MOST_NATS}."


def read_texts(model: Nemotron, texts: Texts, formats: CacheConfig) -> Float[np.ndarray, "N T D"]:
    """Hidden states of all tokens, each read by itself, with a cache in some formats."""
    parts = []
    for start in range(0, len(texts.tokens), ROWS):
        rows = slice(start, start + ROWS)
        parts.append(_read(model, Texts(texts.tokens[rows], texts.lengths[rows]), formats))
    return np.concatenate(parts)[: len(texts.tokens)]


def _read(model: Nemotron, texts: Texts, formats: CacheConfig) -> Float[np.ndarray, "B T D"]:
    """`read_texts` of at most ROWS documents, by one program."""
    count, width = texts.tokens.shape
    engine = EngineConfig(ROWS, width, page_tokens=_PAGE_TOKENS, snapshots=1, cache=formats)
    store, weights = Store.create(model, engine), FlatModel.of(model)
    pages = -(-width // _PAGE_TOKENS)
    table = 1 + np.arange(ROWS * pages, dtype=np.int32).reshape(ROWS, pages)
    filled = np.zeros((ROWS, width), np.int32)
    filled[:count] = texts.tokens
    room = np.zeros(ROWS, np.int32)
    room[:count] = texts.lengths
    hidden = []
    for at in range(width):
        rows = PrefillRows(
            slot=np.arange(ROWS, dtype=np.int32),
            table=table,
            start=np.minimum(at, room).astype(np.int32),
            tokens=filled[:, at : at + 1],
            lengths=(at < room).astype(np.int32),
        )
        snapshots, store = store.snapshots, dataclasses.replace(store, snapshots=None)
        store, new = prefill(weights, store, rows)
        store = dataclasses.replace(store, snapshots=snapshots)
        hidden.append(new[:, 0])
    return np.stack([np.asarray(one) for one in hidden], axis=1)[:count]


def _nats(model: Nemotron, hidden: Array, texts: Texts) -> Float[np.ndarray, "N T"]:
    """Of each token after those before it; the first has none, which is 0."""
    found = score(FlatModel.of(model), jax.numpy.asarray(hidden[:, :-1]), texts.tokens[:, 1:])
    return np.pad(-np.asarray(found.logprobs, np.float64), ((0, 0), (1, 0)))


def _items(
    amounts: Float[np.ndarray, "N T"], sizes: np.ndarray, texts: Texts, *, first: int = 1
) -> dict[str, tuple[float, float]]:
    """Sums by document over its tokens from number `first` on."""
    return {
        f"document_{n:05d}": (float(amounts[n, first:end].sum()), float(sizes[n, first:end].sum()))
        for n, end in enumerate(texts.lengths.tolist())
        if sizes[n, first:end].sum() > 0
    }


def _ready(subject: Subject, options: Options) -> None:
    subject.require_config("cache_formats")
    subject.corpus  # noqa: B018  # see perplexity


SUITE = Suite(
    name="cache_formats",
    about="what it costs to keep keys, values and states in fewer bits",
    options=Options,
    measure=measure,
    ready=_ready,
    one_process=True,
)
