"""Sizes of a Nemotron model, nested like the model itself and checked when built."""

import dataclasses
import math

BLOCK_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def require(condition: bool, owner: str, field: str, value: object, rule: str) -> None:
    """Raise the ValueError of design section 4.5: who, which value, which rule, what to do."""
    if not condition:
        raise ValueError(f"{owner}.{field}={value!r}: {rule}")


def require_positive(config: object, *fields: str) -> None:
    """Every named field is at least one."""
    for field in fields:
        value = getattr(config, field)
        require(value >= 1, type(config).__name__, field, value, "must be at least 1")


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
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner_width + 2 * self.num_groups * self.state_size

    def __post_init__(self) -> None:
        require_positive(
            self, "num_heads", "head_dim", "state_size", "num_groups", "conv_width", "chunk"
        )
        require(
            self.num_heads % self.num_groups == 0,
            "MambaConfig",
            "num_heads",
            self.num_heads,
            f"must be a multiple of num_groups={self.num_groups}",
        )
        low, high = self.time_step_limit
        require(
            0 <= low <= high,
            "MambaConfig",
            "time_step_limit",
            self.time_step_limit,
            "must be (low, high) with 0 <= low <= high; (0, inf) means no clamp",
        )
        require(
            0 < self.time_step_min <= self.time_step_max,
            "MambaConfig",
            "time_step_min",
            self.time_step_min,
            f"must be positive and at most time_step_max={self.time_step_max}",
        )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention without positions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "AttentionConfig",
            "num_heads",
            self.num_heads,
            f"must be a multiple of num_kv_heads={self.num_kv_heads}",
        )


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
        require_positive(self, "num_experts", "experts_per_token", "expert_width", "shared_width")
        require_positive(self, "num_expert_groups", "groups_per_token")
        name = "MoEConfig"
        if self.latent_width is not None:
            require_positive(self, "latent_width")
        require(
            self.num_experts % self.num_expert_groups == 0,
            name,
            "num_experts",
            self.num_experts,
            f"must be a multiple of num_expert_groups={self.num_expert_groups}",
        )
        require(
            self.groups_per_token <= self.num_expert_groups,
            name,
            "groups_per_token",
            self.groups_per_token,
            f"must be at most num_expert_groups={self.num_expert_groups}",
        )
        reachable = self.num_experts // self.num_expert_groups * self.groups_per_token
        require(
            self.experts_per_token <= reachable,
            name,
            "experts_per_token",
            self.experts_per_token,
            f"must be at most {reachable}, the experts a token can reach",
        )


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Dense squared-ReLU MLP, the `-` layer of Nemotron-H."""

    width: int
    projection_bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "width")


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """One physical multi-token-prediction block, applied once for each depth."""

    pattern: str = "*E"

    def __post_init__(self) -> None:
        check_pattern("MTPConfig", self.pattern)
        require(
            "M" not in self.pattern,
            "MTPConfig",
            "pattern",
            self.pattern,
            "may hold only '*', 'E' and '-'",
        )


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
        require_positive(self, "vocab_size", "width", "max_length")
        check_pattern("ModelConfig", self.pattern)
        used = set(self.pattern) | set(self.mtp.pattern if self.mtp else "")
        for letter, field in BLOCK_KINDS.items():
            require(
                letter not in used or getattr(self, field) is not None,
                "ModelConfig",
                field,
                None,
                f"the pattern uses {letter!r}, so {field} must be configured",
            )

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @classmethod
    def from_hf(cls, source: object) -> "ModelConfig":
        """The model of a hub `config.json`, given as a dict, a file or a directory."""
        from nemotron_jax.config import hub  # hub builds these classes

        return hub.from_hf(source)


def check_pattern(owner: str, pattern: str) -> None:
    """A pattern is not empty and holds known letters only."""
    unknown = sorted(set(pattern) - set(BLOCK_KINDS))
    rule = f"must be a non-empty string of the letters {''.join(BLOCK_KINDS)}"
    require(bool(pattern) and not unknown, owner, "pattern", pattern, rule)
