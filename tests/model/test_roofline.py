"""The calculated cost of decoding agrees with the accounting where both say the same."""

import dataclasses

import pytest

from configs import models
from nemotron_jax.model import accounting, roofline

SUPER = models.super_120b()
BANDWIDTH = roofline.Device(bytes_per_second=1e12, flops_per_second=1e30)
COMPUTE = roofline.Device(bytes_per_second=1e30, flops_per_second=1e15)


def test_one_token_reads_the_active_parameters_and_its_states():
    seconds = roofline.step_seconds(SUPER, BANDWIDTH, rows=1, context=8192)
    state = accounting.decode_state(SUPER, 8192)
    moved = 2 * accounting.active_parameters(SUPER, embedding=False)
    moved += state.kv + 2 * (state.ssm + state.conv)
    assert seconds == pytest.approx(moved / 1e12, rel=1e-6)


def test_many_tokens_read_every_expert_once():
    alone = dataclasses.replace(SUPER, mtp=None)
    whole = accounting.parameters(alone).total - SUPER.vocab_size * SUPER.width
    seconds = roofline.step_seconds(SUPER, BANDWIDTH, rows=4096, context=1)
    state = accounting.decode_state(SUPER, 1)
    moved = 2 * whole + 4096 * (state.kv + 2 * (state.ssm + state.conv))
    assert seconds == pytest.approx(moved / 1e12, rel=1e-4)


def test_where_computing_is_longer_it_counts():
    seconds = roofline.step_seconds(SUPER, COMPUTE, rows=3, tokens=2, context=100)
    assert seconds == pytest.approx(6 * accounting.forward_flops(SUPER, 100).total / 1e15)


def test_experts_touched_lie_between_one_tokens_and_all():
    assert roofline.experts_touched(512, 22, 1) == pytest.approx(22)
    assert roofline.experts_touched(8, 2, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert roofline.experts_touched(8, 2, 10_000) == pytest.approx(8)


def test_a_draft_costs_what_the_models_promise():
    assert roofline.draft_cost(SUPER) == pytest.approx(0.064, abs=0.0005)
    assert roofline.draft_cost(models.speculative()) <= 0.10
    one = roofline.draft_seconds(SUPER, BANDWIDTH, rows=1, context=1)
    step = roofline.step_seconds(SUPER, BANDWIDTH, rows=1, context=1)
    assert one / step == pytest.approx(0.064, abs=0.002)


def test_drafts_must_win_more_where_each_token_takes_its_own_experts():
    node = roofline.Device(8 * 4.8e12, 8 * 989e12)
    lengths = [roofline.break_even(SUPER, node, 7, rows=n, context=40_960) for n in (1, 8, 32)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 3.45 > lengths[2]


def test_a_model_without_mtp_has_no_draft_cost():
    with pytest.raises(ValueError, match="mtp"):
        roofline.draft_cost(models.nano_30b())
