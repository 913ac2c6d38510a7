"""What a run of adapters trains, and what it leaves alone, in one line."""

import math

from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.model.adapters import abstract_adapted, adapter_sites
from nemotron_jax.model.parameters import abstract_model, flatten

# A target's place in the model; those of the pattern's blocks that no adapter reaches count 0.
_KINDS = {
    "mamba_in": "Mamba",
    "mamba_out": "Mamba",
    "attention": "attention",
    "mlp": "dense MLPs",
    "shared": "shared experts",
    "latent": "latent projections",
}


def coverage(config: ModelConfig, lora: LoRAConfig | None) -> str | None:
    """The parameters that a run's adapters add, by kind of layer; None without adapters."""
    if lora is None:
        return None
    model = abstract_adapted(config, lora)
    counts: dict[str, int] = {}
    for site in adapter_sites(model):
        kind = _KINDS.get(site.target, "routed experts")
        adapter = getattr(site.module, site.adapter)
        counts[kind] = counts.get(kind, 0) + (0 if adapter is None else adapter.size)
    routed = counts.pop("routed experts", None)
    base = sum(math.prod(leaf.shape) for leaf in flatten(abstract_model(config)).values())
    total = sum(counts.values()) + (routed or 0)
    named = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    if routed is not None:
        named += f"; routed experts: {f'{routed:,}' if routed else 'no'}"
    return (
        f"adapters of rank {lora.rank} train {total:,} parameters beside {base:,} "
        f"({100 * total / base:.2g} %): {named}"
    )
