"""Divergence by the formats of the cache: exact ones are those of one pass over each text."""

import math
from pathlib import Path

import numpy as np
import pytest

from nemotron_jax.config.cache import CacheConfig
from nemotron_jax.data.packing import DocumentTokens
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.evaluation import cache_formats
from nemotron_jax.evaluation.cache_formats import EXACT, Options, Texts, read_texts
from nemotron_jax.evaluation.context import Context, Shared
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.transcripts import Transcripts
from tests.decoding.engines import log_probabilities
from tests.tiny_models import tiny_model


class Corpus:
    """As much of one as the suite reads."""

    def __init__(self) -> None:
        generator, lengths = np.random.default_rng(0), [40, 1, 12, 33]
        tokens = generator.integers(3, 53, sum(lengths)).astype(np.uint16)
        self.held_out = DocumentTokens(tokens, np.cumsum([0, *lengths]))
        self.byte_lengths = np.ones(64, np.int64)


@pytest.mark.more
def test_texts_are_read_as_one_pass_reads_them_and_fewer_bits_change_them():
    model, corpus = tiny_model("M*E"), Corpus()
    options = Options(documents=2, tokens=30)
    texts = Texts.of(corpus.held_out, options)
    assert texts.lengths.tolist() == [30, 12] and texts.tokens.shape == (2, 30)
    hidden = read_texts(for_decoding(model), texts, EXACT)
    nats = cache_formats._nats(for_decoding(model), hidden, texts)
    for row, length in enumerate(texts.lengths):
        text = texts.tokens[row, :length]
        found = np.asarray(log_probabilities(model, text[None]))[0]
        expected = -found[np.arange(length - 1), text[1:]]
        np.testing.assert_allclose(nats[row, 1:length], expected, atol=1e-5)
    subject = Subject(None, None, Path(), model=model.config)
    subject.__dict__["corpus"] = corpus
    progress = Progress("cache_formats")
    context = Context(subject, Transcripts(cache_formats.SUITE), progress, Shared(model))
    result = cache_formats.measure(context, options)
    apart = {name: v.mean for name, v in result.values.items() if name.startswith("kl/")}
    assert len(apart) == 4 and all(0 < value < 0.05 for value in apart.values())
    assert apart["kl/bfloat16"] < apart["kl/float8_e4m3fn"]
    (row,) = [row for row in result.tables[0].rows if row[0] == "bfloat16"]
    again = read_texts(for_decoding(model), texts, CacheConfig("bfloat16"))
    p, q = (np.asarray(model.logits(h[:1]), np.float64)[0] for h in (hidden, again))
    logs = [a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    items = result.values["kl/bfloat16"].items
    assert items["document_00000"] == pytest.approx((kl.sum(), 30), rel=0.05, abs=1e-6)
    assert row[2] == apart["kl/bfloat16"] and math.isfinite(row[-1])
