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


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call of decoding reads and writes, and computes."""

    bytes: float
    flops: float

    def seconds(self, device: Device) -> float:
        """The longer of both."""
        return max(self.bytes / device.bytes_per_second, self.flops / device.flops_per_second)


def step_work(
    config: ModelConfig,
    *,
    rows: int,
    tokens: int = 1,
    context: int,
    weight_bytes: float = 2,
    expert_bytes: float | None = None,
) -> Work:
    """One call of `tokens` tokens for each of `rows` rows; `expert_bytes`: where experts' differ.

    Keys and values are read once a row. A recurrent state is read and written once; where several
    tokens are verified it is read once for all of them, and once more when it is known how many
    stand.
    """
    state = accounting.decode_state(config, context)
    weights, experts = _weights(config, config.pattern, rows * tokens)
    weights += config.vocab_size * config.width
    expert_bytes = weight_bytes if expert_bytes is None else expert_bytes
    moved = weights * weight_bytes + experts * expert_bytes
    moved += rows * (state.kv + (2 if tokens == 1 else 3) * (state.ssm + state.conv))
    return Work(moved, rows * tokens * accounting.forward_flops(config, context).total)


def step_seconds(
    config: ModelConfig,
    device: Device,
    *,
    rows: int,
    tokens: int = 1,
    context: int,
    weight_bytes: float = 2,
) -> float:
    """The longer of reading and computing one call of `tokens` tokens for each of `rows` rows."""
    work = step_work(config, rows=rows, tokens=tokens, context=context, weight_bytes=weight_bytes)
    return work.seconds(device)


def draft_work(
    config: ModelConfig,
    *,
    rows: int,
    context: int,
    weight_bytes: float = 2,
    expert_bytes: float | None = None,
) -> Work:
    """One step of the MTP block for each of `rows` rows, the output head included."""
    check_value(
        "draft_seconds", "config.mtp", config.mtp, config.mtp is not None, "must be configured"
    )
    width = config.width
    weights, experts = _weights(config, config.mtp.pattern, rows)
    weights += 2 * width * width + config.vocab_size * width
    expert_bytes = weight_bytes if expert_bytes is None else expert_bytes
    moved = weights * weight_bytes + experts * expert_bytes
    moved += rows * accounting.decode_state(config, context).mtp_kv
    with_draft = accounting.forward_flops(config, context, mtp_depths=1).total
    return Work(moved, rows * (with_draft - accounting.forward_flops(config, context).total))


def draft_seconds(
    config: ModelConfig, device: Device, *, rows: int, context: int, weight_bytes: float = 2
) -> float:
    """The longer of reading and computing one step of the MTP block for each of `rows` rows."""
    work = draft_work(config, rows=rows, context=context, weight_bytes=weight_bytes)
    return work.seconds(device)


def break_even(
    config: ModelConfig, device: Device, drafts: int, *, rows: int, context: int
) -> float:
    """The acceptance length at which `drafts` drafts are as fast as none: k c_d + c_v."""
    step = step_seconds(config, device, rows=rows, context=context)
    verify = step_seconds(config, device, tokens=drafts + 1, rows=rows, context=context)
    draft = draft_seconds(config, device, rows=rows, context=context)
    return (drafts * draft + verify) / step


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


def touched_experts(config: ModelConfig, pattern: str, tokens: int) -> float:
    """Parameters of the experts in a pattern's layers that `tokens` tokens touch between them."""
    if "E" not in pattern:
        return 0.0
    moe = config.moe
    expert = 2 * moe.expert_width * (moe.latent_width or config.width)
    touched = experts_touched(moe.num_experts, moe.experts_per_token, tokens)
    return pattern.count("E") * expert * touched


def _weights(config: ModelConfig, pattern: str, tokens: int) -> tuple[float, float]:
    """Parameters in the layers of a pattern that `tokens` tokens touch: experts' apart."""
    layers = dataclasses.replace(config, pattern=pattern, mtp=None)
    active = accounting.active_parameters(layers, embedding=False, head=False)
    chosen = touched_experts(config, pattern, 1)  # of which a token's own are among the active
    return active - chosen, touched_experts(config, pattern, tokens)
