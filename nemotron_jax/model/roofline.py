"""The least that a step of decoding takes, from bytes and FLOPs: calculated, not measured.

A step reads every weight that some token of it touches, and each row's states. Kernels, collectives
and imbalance cost more, so a measured step is slower than this one.
"""

import dataclasses

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.model import accounting


@dataclasses.dataclass(frozen=True)
class Device:
    """What a step is held against; several devices are one with the sum of both."""

    bytes_per_second: float
    flops_per_second: float


def step_seconds(
    config: ModelConfig,
    device: Device,
    *,
    rows: int,
    tokens: int = 1,
    context: int,
    weight_bytes: int = 2,
) -> float:
    """The longer of reading and computing one call of `tokens` tokens for each of `rows` rows.

    Keys and values are read once a row; a recurrent state is read once, and written after every
    token, so that a rejection can select one.
    """
    state = accounting.decode_state(config, context)
    weights = _weights(config, config.pattern, rows * tokens) + config.vocab_size * config.width
    moved = weights * weight_bytes + rows * (state.kv + (1 + tokens) * (state.ssm + state.conv))
    flops = rows * tokens * accounting.forward_flops(config, context).total
    return max(moved / device.bytes_per_second, flops / device.flops_per_second)


def draft_seconds(
    config: ModelConfig, device: Device, *, rows: int, context: int, weight_bytes: int = 2
) -> float:
    """The same of one step of the MTP block for each of `rows` rows, the output head included."""
    check_value(
        "draft_seconds", "config.mtp", config.mtp, config.mtp is not None, "must be configured"
    )
    width = config.width
    weights = 2 * width * width + config.vocab_size * width
    weights += _weights(config, config.mtp.pattern, rows)
    moved = weights * weight_bytes + rows * accounting.decode_state(config, context).mtp_kv
    with_draft = accounting.forward_flops(config, context, mtp_depths=1).total
    flops = rows * (with_draft - accounting.forward_flops(config, context).total)
    return max(moved / device.bytes_per_second, flops / device.flops_per_second)


def break_even(
    config: ModelConfig, device: Device, drafts: int, *, rows: int, context: int
) -> float:
    """The acceptance length at which `drafts` drafts are as fast as none: k c_d + c_v."""
    options = {"rows": rows, "context": context}
    step = step_seconds(config, device, **options)
    verify = step_seconds(config, device, tokens=drafts + 1, **options)
    return (drafts * draft_seconds(config, device, **options) + verify) / step


def draft_cost(config: ModelConfig) -> float:
    """Parameters that a draft reads, over those that a step of one token reads: c_d's floor."""
    check_value(
        "draft_cost", "config.mtp", config.mtp, config.mtp is not None, "must be configured"
    )
    with_draft = accounting.forward_flops(config, 1, mtp_depths=1).weights
    step = accounting.active_parameters(config, embedding=False)
    return (with_draft - accounting.forward_flops(config, 1).weights) / 2 / step


def experts_touched(num_experts: int, experts_per_token: int, tokens: int) -> float:
    """How many experts some of `tokens` tokens choose, if all choose alike and independently."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)


def _weights(config: ModelConfig, pattern: str, tokens: int) -> float:
    """Parameters in the layers of a pattern that `tokens` tokens touch between them."""
    layers = dataclasses.replace(config, pattern=pattern, mtp=None)
    active = accounting.active_parameters(layers, embedding=False, head=False)
    if "E" not in pattern:
        return active
    moe = config.moe
    expert = 2 * moe.expert_width * (moe.latent_width or config.width)
    touched = experts_touched(moe.num_experts, moe.experts_per_token, tokens)
    return active + pattern.count("E") * expert * (touched - moe.experts_per_token)
