"""The acceptance suite counts what drafts are worth, on text and in rounds."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.data.loader import held_out_batches
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation import acceptance
from nemotron_jax.evaluation.acceptance import Options, acceptance_length, teacher_forced
from nemotron_jax.evaluation.context import Context, Shared
from nemotron_jax.evaluation.draft_speed import Costs
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Unavailable
from nemotron_jax.evaluation.transcripts import Transcripts
from tests.tiny_models import VOCABULARY, tiny_config, tiny_model


@pytest.fixture(scope="module")
def batches(corpus, run_config):
    found = held_out_batches(corpus, run_config.data, 0, 4)
    small = lambda batch: np.asarray(batch.tokens) % VOCABULARY
    return [dataclasses.replace(batch, tokens=small(batch)) for batch in found]


def test_overlaps_are_those_of_the_two_heads_where_they_meet(batches):
    model, batch = tiny_model("*E", mtp="*E"), batches[0]
    found = teacher_forced(model, batches, 2)
    hidden = model(batch.tokens, segment_ids=batch.segment_ids).hidden
    p = jax.nn.softmax(model.logits(hidden))
    rows, places = np.nonzero(np.asarray(batch.segment_ids) > 0)
    segments, expected = np.asarray(batch.segment_ids), []
    drafted = [
        jax.nn.softmax(model.logits(model.mtp(hidden, batch.tokens, d, batch.segment_ids).hidden))
        for d in (1, 2)
    ]
    for row, place in zip(rows, places, strict=True):
        if place + 2 < segments.shape[1] and segments[row, place + 2] == segments[row, place]:
            expected.append(
                [
                    float(jnp.minimum(p[row, place + d], drafted[d - 1][row, place]).sum())
                    for d in (1, 2)
                ]
            )
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)
    assert 0 < found.min() and found.max() <= 1 + 1e-5


class Letters:
    """A tokenizer of so few ids that any model has them."""

    def encode_batch(self, texts):
        return [[3 + ord(letter) % (VOCABULARY - 3) for letter in text] for text in texts]


@pytest.mark.more
def test_lengths_are_counted_by_kind_of_text_and_number_of_drafts():
    model = tiny_model("*E", mtp="*E")
    subject = Subject(None, None, Path(), model=model.config)
    subject.__dict__["tokenizer"] = Letters()
    asked = Options(k=2, prompts=3, new_tokens=24)
    context = Context(subject, Transcripts(acceptance.SUITE), Progress("acceptance"), Shared(model))
    result = acceptance.measure(context, asked)
    rows = result.tables[0].rows
    assert [row[:2] for row in rows] == [(name, 2) for name in acceptance.TEXTS]
    # The first token is the prompt's; a round gives what it accepts and one more, but for the last.
    tokens = sum(row[-1] * row[2] for row in rows)
    assert len(rows) * 3 * 23 <= tokens <= len(rows) * 3 * (23 + 2)
    for name, _, length, low, high, rate, verified in rows:
        assert 1 <= length <= 3 and low <= length <= high and verified >= 3 * 23 / 3
        assert rate == pytest.approx((length - 1) / 2)
        assert result.values[f"mean_length_2/{name}"].n == 3
    chances = [row[2] for row in result.tables[1].rows]
    both = chances[0] * (1 + chances[1])
    assert result.values["mean_length_2"].mean == pytest.approx(1 + both)
    assert acceptance.measure(context, asked).values == result.values


def test_a_model_without_drafts_is_said_to_have_none():
    subject = Subject(None, None, Path(), model=tiny_config("*E"))
    with pytest.raises(Unavailable, match="no MTP block"):
        acceptance.SUITE.ready(subject, Options())


def test_verifications_and_accepted_drafts_are_read_from_places():
    request = Request((1,), Wanted(9), 0, lambda: False)
    request.places = [-1, 1, 3, 4, 0, 1, 2]  # two drafts and one's own, none, one
    assert request.verifications == 3 and request.accepted_drafts == 3
    value = acceptance.length_of([request])
    assert value.mean == 2.0 and value.interval is None


def test_prompts_are_different_and_the_same_everywhere():
    tokenizer = Letters()
    found = acceptance._varied(tokenizer, acceptance.TEXTS["code"], 16)
    assert len(set(found)) == 16 and found == acceptance._varied(
        tokenizer, acceptance.TEXTS["code"], 16
    )
    assert isinstance(tokenizer, Letters) and not isinstance(tokenizer, Tokenizer)


def test_acceptance_length_counts_runs_of_accepted_drafts():
    certain = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert acceptance_length(certain) == 1 + (2 + 0) / 2
    assert acceptance_length(np.full((3, 2), 0.5)) == 1 + 0.5 + 0.25


def test_costs_add_up_to_the_speed_up():
    costs = Costs(step=1.0, round=2.0, verify=1.4, drafts=3)
    assert costs.draft == pytest.approx(0.2) and costs.verification == 1.4
    assert costs.speed_up(2.6) == pytest.approx(2.6 / (3 * costs.draft + costs.verification))
