"""The calculated decoders have the published sizes, and their speeds keep the roofline's order."""

import pytest

from tests.benchmarks import rooflines
from tests.benchmarks.rooflines import BF16, MEAN_CONTEXT, Decoder


def active(decoder: Decoder) -> float:
    routed = decoder.moe_layers * decoder.experts_per_token * decoder.expert
    return (routed + decoder.dense) / 1e9


def test_other_models_have_their_published_parameters():
    oss, qwen = rooflines.gpt_oss_120b(), rooflines.qwen35_122b()
    embeddings = 201_088 * 2880 / 1e9, 248_320 * 3072 / 1e9
    total = lambda d: (d.moe_layers * d.num_experts * d.expert + d.dense) / 1e9
    assert total(oss) + embeddings[0] == pytest.approx(116.8, rel=0.01)  # OpenAI: 117B, 5.1B
    assert active(oss) == pytest.approx(5.1, rel=0.02)
    assert total(qwen) + embeddings[1] == pytest.approx(122, rel=0.02)  # Qwen: 122B, 10B
    assert active(qwen) + embeddings[1] == pytest.approx(10, rel=0.05)


def test_a_sequence_of_super_grows_by_eight_attention_layers():
    decoder = rooflines.nemotron_super(BF16, BF16, 2)
    assert decoder.kv_token == 8 * 2 * 2 * 128 * 2  # keys and values of 2 heads of 128, BF16
    assert rooflines.nemotron_super(BF16, BF16, 1).kv_token == decoder.kv_token / 2


def test_more_rows_are_faster_together_and_slower_each():
    for _, decoder in rooflines.DECODERS:
        speeds = [decoder.tokens_per_second(rows, 8, MEAN_CONTEXT) for rows in (1, 32, 256)]
        assert speeds == sorted(speeds)
        each = [speed / rows for speed, rows in zip(speeds, (1, 32, 256), strict=True)]
        assert each == sorted(each, reverse=True)
    assert len(rooflines.table()) == 2 + len(rooflines.DECODERS)
