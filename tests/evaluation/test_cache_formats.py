"""Bits per byte by the formats of the cache: exact ones are those of one pass over each text."""

import math

import numpy as np
import pytest

from nemotron_jax.evaluation.cache_formats import CacheFormats
from tests.decoding.engines import log_probabilities
from tests.tiny_models import tiny_model


class Corpus:
    """As much of one as the suite reads."""

    byte_lengths = np.ones(64, np.int64)

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        lengths = [40, 1, 12, 33]
        self.held_out = self
        self.offsets = np.cumsum([0, *lengths])
        self.tokens = generator.integers(3, 53, sum(lengths)).astype(np.uint16)


@pytest.mark.slow
def test_bits_are_those_of_one_pass_and_fewer_bits_change_them():
    model, corpus = tiny_model("M*E"), Corpus()
    result = CacheFormats(corpus, documents=2, tokens=30).run(model)
    bits = 0.0
    for start, count in ((0, 30), (41, 12)):
        text = corpus.tokens[start : start + count].astype(np.int32)
        found = np.asarray(log_probabilities(model, text[None]))[0]
        bits -= found[np.arange(count - 1), text[1:]].sum() / math.log(2)
    assert result.values["bits_per_byte"] == pytest.approx(bits / 40, rel=1e-5)
    changes = {name: v for name, v in result.values.items() if name.endswith("_more_bits_per_byte")}
    assert len(changes) == 4 and all(0 < abs(change) < 0.05 for change in changes.values())
