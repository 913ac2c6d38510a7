"""Sizes of a Nemotron model, nested like the model itself and checked when built."""

import dataclasses
import math
import os
from collections.abc import Mapping

from nemotron_jax.config import hub
from nemotron_jax.config.checks import at_least_one, check, check_value, counts, is_finite, positive

BLOCK_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 mixer. The time-step range only shapes initialisation; `time_step_limit` clamps at
    run time."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int  # heads of one group share B and C
    conv_width: int = 4
    chunk: int = 128
    conv_bias: bool = True
    projection_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner_width(self) -> int:
        """Channels of all heads together: the width of x and z."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that the convolution runs over: those of x, and of B and C of every group."""
        return self.inner_width + 2 * self.num_groups * self.state_size

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "head_dim", "state_size", "num_groups")
        at_least_one(self, "conv_width", "chunk")
        positive(self, "time_step_min", "time_step_max", "time_step_floor")
        rule = f"must be a multiple of num_groups={self.num_groups}"
        check(self, "num_heads", self.num_heads % self.num_groups == 0, rule)
        limits = self.time_step_limit
        rule = "must be (low, high) with 0 <= low <= high; (0, inf) means no clamp"
        check(self, "time_step_limit", isinstance(limits, tuple) and len(limits) == 2, rule)
        low, high = limits
        in_order = is_finite(low) and (is_finite(high) or high == math.inf) and 0 <= low <= high
        check(self, "time_step_limit", in_order, rule)
        rule = f"must be at most time_step_max={self.time_step_max}"
        check(self, "time_step_min", self.time_step_min <= self.time_step_max, rule)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention without positions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "num_kv_heads", "head_dim")
        rule = f"must be a multiple of num_kv_heads={self.num_kv_heads}"
        check(self, "num_heads", self.num_heads % self.num_kv_heads == 0, rule)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """LatentMoE; without `latent_width` the experts work at the model's width."""

    num_experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int  # hidden width of the shared expert, which sees the full model width
    latent_width: int | None = None  # width in which tokens are routed and mixed
    num_expert_groups: int = 1
    groups_per_token: int = 1
    normalize_weights: bool = True
    weight_scale: float = 1.0  # multiplies the normalised routing weights
    projection_bias: bool = False  # of the latent projections and the shared expert

    def __post_init__(self) -> None:
        at_least_one(self, "num_experts", "experts_per_token", "expert_width", "shared_width")
        at_least_one(self, "num_expert_groups", "groups_per_token")
        positive(self, "weight_scale")
        if self.latent_width is not None:
            at_least_one(self, "latent_width")
        groups = self.num_expert_groups
        rule = f"must be a multiple of num_expert_groups={groups}"
        check(self, "num_experts", self.num_experts % groups == 0, rule)
        rule = f"must be at most num_expert_groups={groups}"
        check(self, "groups_per_token", self.groups_per_token <= groups, rule)
        reachable = self.num_experts // groups * self.groups_per_token
        rule = f"must be at most {reachable}, the experts a token can reach"
        check(self, "experts_per_token", self.experts_per_token <= reachable, rule)


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Dense squared-ReLU MLP, the `-` layer of Nemotron-H."""

    width: int
    projection_bias: bool = False

    def __post_init__(self) -> None:
        at_least_one(self, "width")


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """One physical multi-token-prediction block, applied once for each depth."""

    pattern: str = "*E"

    def __post_init__(self) -> None:
        check_pattern("MTPConfig", self.pattern)
        check(self, "pattern", "M" not in self.pattern, "may hold only '*', 'E' and '-'")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: one mixer a layer, in the order of `pattern` (M Mamba-2, * attention, E MoE, -
    MLP)."""

    vocab_size: int
    width: int
    pattern: str
    mamba: MambaConfig | None = None
    attention: AttentionConfig | None = None
    moe: MoEConfig | None = None
    mlp: MLPConfig | None = None
    mtp: MTPConfig | None = None
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    max_length: int = 1_048_576
    bos_token: int = 1
    eos_token: int = 2
    pad_token: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "vocab_size", "width", "max_length")
        positive(self, "norm_epsilon", "init_std")
        for token in ("bos_token", "eos_token", "pad_token"):
            counts(self, token)
            rule = f"must be below vocab_size={self.vocab_size}, since it is one of those tokens"
            check(self, token, getattr(self, token) < self.vocab_size, rule)
        check_pattern("ModelConfig", self.pattern)
        used = set(self.pattern) | set(self.mtp.pattern if self.mtp else "")
        for letter, field in BLOCK_KINDS.items():
            rule = f"the pattern uses {letter!r}, so {field} must be configured"
            check(self, field, letter not in used or getattr(self, field) is not None, rule)

    @property
    def num_layers(self) -> int:
        """Blocks of the trunk; those of the MTP block are not among them."""
        return len(self.pattern)

    @classmethod
    def from_hf(cls, source: Mapping | str | os.PathLike) -> "ModelConfig":
        """The model of a hub `config.json`, given as a dict, a file or a directory.

        Raises ValueError and warns as `hub.read` does.
        """
        try:
            values = hub.read(source)
            for field, part in PARTS.items():
                if values[field] is not None:
                    values[field] = part(**values[field])
            return cls(**values)
        except ValueError as error:
            if isinstance(source, Mapping) or str(source) in str(error):
                raise
            raise ValueError(f"{source}: {error}") from None


PARTS = {
    "mamba": MambaConfig,
    "attention": AttentionConfig,
    "moe": MoEConfig,
    "mlp": MLPConfig,
    "mtp": MTPConfig,
}


def check_pattern(owner: str, pattern: str) -> None:
    """A pattern is not empty and holds known letters only."""
    rule = f"must be a non-empty string of the letters {''.join(BLOCK_KINDS)}"
    known = isinstance(pattern, str) and set(pattern) <= set(BLOCK_KINDS)
    check_value(owner, "pattern", pattern, known and len(pattern) > 0, rule)
