"""The acceptance suite counts what drafts are worth, on text and in rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.data.loader import held_out_batches
from nemotron_jax.evaluation.acceptance import Acceptance, Costs, acceptance_length, repeated
from tests.tiny_models import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def batches(corpus, run_config):
    return tuple(held_out_batches(corpus, run_config.data, 0, 4))


@pytest.fixture(scope="module")
def suite(corpus, batches):
    small = [
        dataclasses.replace(batch, tokens=np.asarray(batch.tokens) % VOCABULARY)
        for batch in batches
    ]
    return Acceptance(
        corpus,
        tuple(small),
        drafts=(2,),
        batch_sizes=(1,),
        prompts=2,
        prompt_tokens=8,
        new_tokens=12,
        repetitions=1,
    )


def test_overlaps_are_those_of_the_two_heads_where_they_meet(suite):
    model, batch = tiny_model("*E", mtp="*E"), suite.batches[0]
    found = suite.teacher_forced(model)
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


def test_the_suite_reports_lengths_speeds_and_costs(suite):
    result = suite.run(tiny_model("*E", mtp="*E"))
    for name in ("teacher_forced", "sampled", "greedy"):
        assert 1 <= result.values[f"al_{name}_2"] <= 3
    assert result.values["draft_cost_1_rows_2"] > 0
    assert result.values["verify_cost_1_rows_3_tokens"] > 0
    assert [table.rows[0][0] for table in result.tables] == [1, 1]


def test_a_model_without_drafts_is_an_error(suite):
    with pytest.raises(ValueError, match="no MTP block"):
        suite.run(tiny_model("*E"))


def test_acceptance_length_counts_runs_of_accepted_drafts():
    certain = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert acceptance_length(certain) == 1 + (2 + 0) / 2
    assert acceptance_length(np.full((3, 2), 0.5)) == 1 + 0.5 + 0.25


def test_repeated_grams_are_those_seen_before_in_the_row():
    assert repeated(np.array([[1, 2, 3, 4, 1, 2, 3, 4]]), 4) == pytest.approx(1 / 5)
    assert repeated(np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]), 4) == 0


def test_costs_add_up_to_the_speed_up():
    costs = Costs(step=1.0, round=2.0, verify=1.4, drafts=3)
    assert costs.draft == pytest.approx(0.2) and costs.verification == 1.4
    assert costs.speed_up(2.6) == pytest.approx(2.6 / (3 * costs.draft + costs.verification))
