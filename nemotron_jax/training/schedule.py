"""The learning rate of a step: warm-up, stable, minus-square-root decay, counted in tokens."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.run import ScheduleConfig
from nemotron_jax.types import Array


def learning_rate(
    config: ScheduleConfig, step: Int[Array, ""] | int, tokens_per_step: int
) -> Float[Array, ""]:
    """Learning rate of step number `step`, which has `step * tokens_per_step` tokens before it.

    It rises linearly from 0 over `warmup_tokens`, stays at the peak, and over the last
    `decay_tokens` is final + (peak - final) * (1 - sqrt(progress)); past `total_tokens` it stays at
    the final rate. Zero `decay_tokens` mean no decay at all. `step` may be traced;
    `tokens_per_step` is static. The relative error is below 1e-6.

    Tokens reach 2.5e13, beyond int32 and the integers of float32, so time is counted in steps. The
    steps since the decay began and those until it ends are differences of integers, exact, with the
    fraction of a step apart: a rounded difference would be off by up to 3 % of a step, which sqrt
    magnifies at the beginning and the small final rate at the end.
    Raises ValueError when the schedule has more steps than int32 counts.
    """
    check_value(
        "learning_rate", "tokens_per_step", tokens_per_step, tokens_per_step >= 1, "must be >= 1"
    )
    few = config.total_tokens // tokens_per_step < 2**31
    rule = f"makes total_tokens={config.total_tokens} more than 2**31 steps; make steps larger"
    check_value("learning_rate", "tokens_per_step", tokens_per_step, few, rule)
    step = jnp.asarray(step, jnp.int32)
    peak, final = config.peak_learning_rate, config.final_learning_rate
    rate = jnp.float32(peak)
    if config.decay_tokens:
        decay_steps = config.decay_tokens / tokens_per_step
        since = _steps_after(step, config.total_tokens - config.decay_tokens, tokens_per_step)
        left = -_steps_after(step, config.total_tokens, tokens_per_step)
        progress = jnp.clip(since / decay_steps, 0.0, 1.0)
        # (1 - p) / (1 + sqrt(p)) is 1 - sqrt(p) without its cancellation near p = 1.
        height = jnp.clip(left / decay_steps, 0.0, 1.0) / (1.0 + jnp.sqrt(progress))
        rate = final + (peak - final) * height
    if config.warmup_tokens:
        warmth = step.astype(jnp.float32) / (config.warmup_tokens / tokens_per_step)
        rate = jnp.where(warmth < 1.0, peak * warmth, rate)
    return jnp.asarray(rate, jnp.float32)


def _steps_after(step: Int[Array, ""], tokens: int, tokens_per_step: int) -> Float[Array, ""]:
    """Steps from the moment that `tokens` tokens have been seen to `step`; negative before it."""
    whole, rest = divmod(tokens, tokens_per_step)
    return (step - whole).astype(jnp.float32) - rest / tokens_per_step
