"""Low-rank adapters: which matrices get one, and how large."""

import dataclasses

from nemotron_jax.config.checks import at_least_one, check, is_finite, one_of, positive
from nemotron_jax.config.dtypes import EXPERTS
from nemotron_jax.config.model import ModelConfig

# Fused kernels of Mamba layers pass adapters of the output projection by, so PEFT takes none there.
REFUSED_BY_PEFT = ("mamba_out",)
# By block letter; latent projections are there where the model has a latent width.
_OF_BLOCKS = {
    "M": ("mamba_in", "mamba_out"),
    "*": ("attention",),
    "-": ("mlp",),
    "E": ("shared", "latent", "experts"),
}
BASE_DTYPES = ("bfloat16", "float32")  # of a base
TARGETS = ("attention", "mamba_in", "mamba_out", "mlp", "shared", "latent", "experts")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """W + alpha / rank · A B beside each matrix of the targets; only A and B are trained.

    `mamba_in` are z, x, B, C and dt, one matrix with one A on the hub; `latent` the projections
    into and out of the experts' width; `experts` get an A and a B each. Attention alone reaches few
    of the family's layers. The defaults are every linear of Megatron-Bridge's recipes for this
    family but `mamba_out`, which PEFT refuses to load. `dropout` is the share of an adapter's
    inputs that are left out in training; routed experts have none, as in PEFT, and stage grpo
    refuses it: its ratio and its KL term would compare the policy with a thinned one.

    The base is held in `base_dtype`, its routed experts as floats of it or as NVFP4 codes
    (`base_experts`: dense, nvfp4). Checkpoints hold the adapters alone.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "mamba_in", "mlp", "shared", "latent")
    dropout: float = 0.0
    base_dtype: str = "bfloat16"
    base_experts: str = "dense"

    def chosen(self, model: ModelConfig) -> tuple[str, ...]:
        """Those of the targets that a model has."""
        has_latent = model.moe is not None and model.moe.latent_width is not None
        there = {target for letter in model.pattern for target in _OF_BLOCKS[letter]}
        there -= set() if has_latent else {"latent"}
        return tuple(target for target in self.targets if target in there)

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        at_least_one(self, "rank")
        one_of(self, "base_dtype", BASE_DTYPES)
        one_of(self, "base_experts", EXPERTS)
        positive(self, "alpha")
        known = len(self.targets) > 0 and set(self.targets) <= set(TARGETS)
        check(self, "targets", known, f"must name some of {', '.join(TARGETS)}")
        share = is_finite(self.dropout) and 0 <= self.dropout < 1
        check(self, "dropout", share, "must be at least 0 and below 1")
        rule = "must be 0 with the target experts, which have no dropout"
        check(self, "dropout", self.dropout == 0 or "experts" not in self.targets, rule)
