"""Held-out loss is the plain mean of -log p over each token once, however it is grouped."""

import math

import numpy as np
import pytest

from nemotron_jax.data.held_out import split_documents
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.data.sources import collect
from nemotron_jax.evaluation.held_out import held_out_nats
from nemotron_jax.evaluation.perplexity import (
    by_document,
    held_out_sources,
    result_of,
    score_held_out,
)
from nemotron_jax.evaluation.statistics import NORMAL_95, value_over


@pytest.fixture(scope="module")
def scores(corpus, run_config, model):
    return score_held_out(model, corpus, run_config.data, chunk=50)


@pytest.fixture(scope="module")
def result(scores, corpus, run_config):
    return result_of(scores, corpus, run_config.data)


def plain_nats(model, tokens, targets, segment_ids):
    """-log softmax in float64 from whole logits, one row at a time."""
    logits = np.asarray(
        model.logits(model(tokens[None], segment_ids=segment_ids[None]).hidden), np.float64
    )[0]
    log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return log_total - logits[np.arange(len(targets)), targets]


def test_the_mean_is_that_of_log_probabilities_of_whole_logits(model, corpus, run_config, result):
    rows = held_out_row_count(corpus, run_config.data)
    nats, tokens, num_bytes = 0.0, 0, 0
    for batch in held_out_batches(corpus, run_config.data, 0, rows):
        for row in range(batch.tokens.shape[0]):
            scored = batch.weights[row, :, 0] > 0
            targets = batch.targets[row, :, 0]
            each = plain_nats(model, batch.tokens[row], targets, batch.segment_ids[row])
            nats += each[scored].sum()
            tokens += scored.sum()
            num_bytes += corpus.byte_lengths[targets[scored]].sum()
    values = {name: value.mean for name, value in result.values.items()}
    assert values["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert values["scored_tokens"] == tokens


def test_every_token_with_a_predecessor_is_scored_once(corpus, scores):
    lengths = np.diff(corpus.held_out.offsets)
    found = np.bincount(scores.document, minlength=len(lengths))
    np.testing.assert_array_equal(found, lengths - 1)
    tokens, starts = corpus.held_out.tokens, corpus.held_out.offsets[:-1]
    spelled = corpus.byte_lengths[tokens].sum() - corpus.byte_lengths[tokens[starts]].sum()
    assert scores.bytes.sum() == spelled


def test_training_and_the_suite_score_the_same_rows(model, corpus, run_config, result):
    rows = held_out_row_count(corpus, run_config.data)
    batches = held_out_batches(corpus, run_config.data, 0, rows)
    nats, tokens = held_out_nats(model, batches)
    assert result.values["nats_per_token"].mean == pytest.approx(nats / tokens, rel=1e-6)


def test_context_counts_the_tokens_of_a_document_that_a_row_shows(scores, corpus, run_config):
    length = run_config.data.sequence_length
    assert scores.context.min() == 1 and scores.context.max() <= length
    # A document of n tokens begins somewhere: its first min(n - 1, length) contexts lie in one row
    # or are cut by a row's end, after which they count from 1 again.
    for document, size in enumerate(np.diff(corpus.held_out.offsets)):
        own = scores.context[scores.document == document]
        restarts = np.flatnonzero(own == 1)
        assert len(own) == size - 1 and len(restarts) <= 2 + size // length
        for begin, end in zip(restarts, [*restarts[1:], len(own)], strict=True):
            np.testing.assert_array_equal(own[begin:end], np.arange(1, end - begin + 1))


def test_groups_average_to_the_total(result):
    assert [table.title for table in result.tables] == ["By context", "By source"]
    for table in result.tables:
        tokens = sum(row[1] for row in table.rows)
        total = sum(row[1] * row[2] for row in table.rows)
        assert tokens == result.values["scored_tokens"].mean
        assert total / tokens == pytest.approx(result.values["nats_per_token"].mean, rel=1e-9)
        assert len({row[2] for row in table.rows}) == len(table.rows) > 1


def test_each_held_out_document_belongs_to_the_source_it_was_read_from(run_config):
    data = run_config.data
    collections = [collect(source) for source in data.sources]
    texts = [{d.text for d in collection.documents} for collection in collections]
    held_out = split_documents(collections, data.held_out_fraction).held_out
    owners = held_out_sources(data)
    assert len(owners) == len(held_out) and set(owners) == {0, 1, 2}
    assert np.all(np.diff(owners) >= 0)
    for document, owner in zip(held_out, owners, strict=True):
        assert document.text in texts[owner] or owner == 2


def test_the_standard_error_is_that_of_simulated_samples():
    generator = np.random.default_rng(0)

    def sample():
        """30 documents of 1 to 40 tokens, each with a loss level of its own."""
        sizes = generator.integers(1, 41, 30)
        document = np.repeat(np.arange(30), sizes)
        level = generator.normal(3.0, 0.5, 30)[document]
        return level + generator.normal(0, 0.3, len(document)), document

    found = []
    for _ in range(4000):
        nats, document = sample()
        value = value_over(by_document(document, nats, np.ones_like(nats)))
        found.append((value.mean, (value.interval[1] - value.mean) / NORMAL_95))
    means, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)  # 4000 samples: 1 %
    alone = value_over({"document": (4.0, 2.0)})
    assert alone.mean == 2.0 and alone.interval is None
