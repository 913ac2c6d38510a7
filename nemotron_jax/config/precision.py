"""The precision recipe as data: which weight matmul of which layer runs in which number format."""

import dataclasses

from nemotron_jax.config.checks import check, check_value, counts, one_of

ROLES = (
    "mamba_in",
    "mamba_out",
    "attention_q",
    "attention_k",
    "attention_v",
    "attention_out",
    "latent_down",
    "latent_up",
    "expert_up",
    "expert_down",
    "shared_up",
    "shared_down",
    "mlp_up",
    "mlp_down",
)
HIGH, MXFP8, NVFP4 = "high", "mxfp8", "nvfp4"
FORMATS = (HIGH, MXFP8, NVFP4)
ROUNDINGS = ("nearest", "stochastic")
WEIGHT_BLOCKS = ("16x16", "1x16")


@dataclasses.dataclass(frozen=True)
class NVFP4Config:
    """How NVFP4 matmuls treat their operands; the defaults are the published recipe.

    Gradients are quantised twice, for the gradient of the input and of the weight, each with random
    numbers of its own. `hadamard` transforms both operands of the weight gradient along the tokens.
    Scales come from the whole tensor's largest magnitude, that of all devices' rows.
    """

    gradient_rounding: str = "stochastic"
    activation_rounding: str = "nearest"
    weight_block: str = "16x16"
    hadamard: bool = True

    def __post_init__(self) -> None:
        one_of(self, "gradient_rounding", ROUNDINGS)
        one_of(self, "activation_rounding", ROUNDINGS)
        one_of(self, "weight_block", WEIGHT_BLOCKS)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Roles in NVFP4 and in MXFP8; all others, the MTP block and the last layers stay high.

    High is the compute dtype. From step `switch_step` on (0: never) the `switch_roles` (none named:
    all NVFP4 roles) run in `switch_format`.
    """

    nvfp4_roles: tuple[str, ...] = ()
    mxfp8_roles: tuple[str, ...] = ()
    num_last_layers_high: int = 0
    nvfp4: NVFP4Config = NVFP4Config()
    switch_step: int = 0
    switch_format: str = HIGH
    switch_roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rule = f"is not a weight matmul; choose one of {', '.join(ROLES)}"
        for field in ("nvfp4_roles", "mxfp8_roles", "switch_roles"):
            for role in getattr(self, field):
                check_value("PrecisionConfig", field, role, role in ROLES, rule)
        twice = set(self.nvfp4_roles) & set(self.mxfp8_roles)
        rule = f"{', '.join(sorted(twice))} cannot be in nvfp4_roles too"
        check(self, "mxfp8_roles", not twice, rule)
        counts(self, "num_last_layers_high", "switch_step")
        one_of(self, "switch_format", (HIGH, MXFP8))

    @property
    def emulated(self) -> bool:
        """Whether any matmul is quantised."""
        return bool(self.nvfp4_roles or self.mxfp8_roles)

    def format_of(self, role: str, layer: int, num_layers: int) -> str:
        """The format of one matmul of the backbone's layer, counted from 0."""
        if layer >= num_layers - self.num_last_layers_high:
            return HIGH
        return self.formats.get(role, HIGH)

    @property
    def formats(self) -> dict[str, str]:
        """The format of each role that is not high, outside the last layers."""
        return {role: MXFP8 for role in self.mxfp8_roles} | {
            role: NVFP4 for role in self.nvfp4_roles
        }

    def at_step(self, step: int) -> "PrecisionConfig":
        """The recipe in force at a step: without a switch, before it or after it."""
        settled = {"switch_step": 0, "switch_format": HIGH, "switch_roles": ()}
        if not self.switch_step or step < self.switch_step:
            return dataclasses.replace(self, **settled)
        moved = set(self.switch_roles or self.nvfp4_roles)
        formats = {**self.formats, **{role: self.switch_format for role in moved}}
        named = lambda wanted: tuple(role for role in ROLES if formats.get(role) == wanted)
        return dataclasses.replace(
            self, nvfp4_roles=named(NVFP4), mxfp8_roles=named(MXFP8), **settled
        )


def preset(name: str, num_layers: int) -> PrecisionConfig:
    """A recipe by name, for a model of so many layers; raises ValueError for an unknown one.

    `high` quantises nothing; `nvfp4` is `nemotron3_nvfp4` with as many of the last layers high as
    the published models have: 14 of 88, 8 of 52.
    """
    last = num_layers * 16 // 100
    known = {"high": PrecisionConfig(), "nvfp4": nemotron3_nvfp4(last)}
    rule = f"must be one of {', '.join(known)}, or single fields, as in precision.switch_step=100"
    check_value("Execution", "precision", name, name in known, rule)
    return known[name]


def nemotron3_nvfp4(num_last_layers_high: int) -> PrecisionConfig:
    """NVIDIA's recipe: Mamba input projections and all MLPs in NVFP4, Mamba outputs in MXFP8.

    Attention, latent projections, MTP, embeddings and head stay high, and so do the last 15 % of
    the layers: 14 of Super's 88, 8 of Nano's 52. Source: Megatron-Bridge, nemotron_3_super recipe
    `bf16_with_nvfp4_mixed`; numerics of arXiv:2509.25149.
    """
    return PrecisionConfig(
        nvfp4_roles=(
            "mamba_in",
            "expert_up",
            "expert_down",
            "shared_up",
            "shared_down",
            "mlp_up",
            "mlp_down",
        ),
        mxfp8_roles=("mamba_out",),
        num_last_layers_high=num_last_layers_high,
    )
