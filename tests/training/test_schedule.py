"""The learning rate equals its formula in exact arithmetic, at published points and between."""

import fractions
import math

import jax
import numpy as np
import pytest

from configs import nano, pretrain_super_phase1, pretrain_super_phase2
from nemotron_jax.config.run import ScheduleConfig
from nemotron_jax.training.schedule import learning_rate

SUPER = pretrain_super_phase1.SCHEDULE
STEP_TOKENS = 3072 * 8192
SMALL = ScheduleConfig(3e-3, 3e-5, warmup_tokens=1000, decay_tokens=2500, total_tokens=10_000)


def exact_rate(config: ScheduleConfig, step: int, tokens_per_step: int) -> float:
    """The definition: tokens as whole numbers, progress as a fraction."""
    tokens = step * tokens_per_step
    peak, final = config.peak_learning_rate, config.final_learning_rate
    if tokens < config.warmup_tokens:
        return peak * float(fractions.Fraction(tokens, config.warmup_tokens))
    start = config.total_tokens - config.decay_tokens
    if tokens <= start or config.decay_tokens == 0:
        return peak
    progress = min(fractions.Fraction(tokens - start, config.decay_tokens), 1)
    return final + (peak - final) * (1 - math.sqrt(progress))


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (100_000_000_000, 2.25e-4),
        (200_000_000_000, 4.5e-4),
        (20_000_000_000_000, 4.5e-4),
        (21_250_000_000_000, 4.5e-6 + 4.455e-4 * 0.5),
        (25_000_000_000_000, 4.5e-6),
        (26_000_000_000_000, 4.5e-6),
    ],
)
def test_super_has_its_published_rates(tokens: int, rate: float) -> None:
    step_tokens = 1_000_000  # divides every one of these points
    measured = learning_rate(SUPER, tokens // step_tokens, step_tokens)
    assert float(measured) == pytest.approx(rate, rel=1e-6)
    assert measured.dtype == np.float32 and measured.shape == ()


@pytest.mark.parametrize(
    ("tokens", "rate"), [(0, 0.0), (8_400_000_000, 1e-3), (25_000_000_000_000, 1e-5)]
)
def test_nano_has_its_published_rates(tokens: int, rate: float) -> None:
    measured = learning_rate(nano.SCHEDULE, tokens // 1_000_000, 1_000_000)
    assert float(measured) == pytest.approx(rate, rel=1e-6)


def test_phases_of_super_meet_where_the_decay_starts() -> None:
    first = pretrain_super_phase1.get_config()
    second = pretrain_super_phase2.get_config()
    assert first.training.schedule == second.training.schedule
    assert first.data.sources != second.data.sources
    for config, tokens in ((first, 20e12), (second, 25e12)):
        seen = config.training.steps * config.data.batch_size * config.data.sequence_length
        assert abs(seen - tokens) <= STEP_TOKENS
    start, end = first.training.steps, second.training.steps
    assert float(learning_rate(SUPER, start, STEP_TOKENS)) == pytest.approx(4.5e-4)
    assert float(learning_rate(SUPER, start + 1, STEP_TOKENS)) < 4.5e-4
    assert float(learning_rate(SUPER, end, STEP_TOKENS)) == pytest.approx(4.5e-6)


@pytest.mark.parametrize("step_tokens", [STEP_TOKENS, 8192 * 16, 25_165_827])
def test_rates_equal_exact_arithmetic_under_jit(step_tokens: int) -> None:
    start = (SUPER.total_tokens - SUPER.decay_tokens) // step_tokens
    last = SUPER.total_tokens // step_tokens
    rng = np.random.default_rng(0)
    steps = np.concatenate(
        [
            rng.integers(0, last + 10, 200),
            start + np.arange(-3, 20),
            last + np.arange(-3, 3),
            SUPER.warmup_tokens // step_tokens + np.arange(-3, 3),
            np.arange(4),
        ]
    )
    rates = jax.jit(jax.vmap(lambda step: learning_rate(SUPER, step, step_tokens)))(steps)
    expected = [exact_rate(SUPER, int(step), step_tokens) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step_tokens", [1, 7, 100, 9999])
def test_small_schedules_equal_exact_arithmetic(step_tokens: int) -> None:
    for step in range(0, 10_100 // step_tokens + 2, max(1, 300 // step_tokens)):
        expected = exact_rate(SMALL, step, step_tokens)
        assert float(learning_rate(SMALL, step, step_tokens)) == pytest.approx(expected, rel=1e-6)


def test_a_schedule_without_warm_up_or_decay_is_constant() -> None:
    flat = ScheduleConfig(1e-3, 1e-5, warmup_tokens=0, decay_tokens=0, total_tokens=100)
    rates = {float(learning_rate(flat, step, 10)) for step in (0, 5, 10, 20)}
    assert rates == {float(np.float32(1e-3))}


def test_steps_that_int32_cannot_count_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_step=1024.*make steps larger"):
        learning_rate(SUPER, 0, 1024)
    with pytest.raises(ValueError, match="tokens_per_step=0"):
        learning_rate(SUPER, 0, 0)
