"""Adapters put on a model's matrices, and merged into them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.low_rank import Adapter, LowRank
from nemotron_jax.layers.packed import PackedMatrix
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.packing import experts_of, pack_experts
from nemotron_jax.model.parameters import abstract_model, variables


@dataclasses.dataclass(frozen=True)
class Site:
    """One matrix that may have an adapter: the module that holds it, and under which names."""

    name: str  # dotted, of the matrix
    target: str
    module: Any
    matrix: str
    adapter: str
    shares: Any = None  # the module whose adapter's A this one's goes with


def add_adapters(model: Nemotron, lora: LoRAConfig, key: Array) -> Nemotron:
    """The model with new adapters on the targets, which change nothing yet: B is zero.

    A is uniform within ±1/√inputs, float32, as PEFT draws it. The trunk alone gets adapters: the
    MTP block drafts with its own matrices, and hub libraries have none to adapt. Raises ValueError
    when the model has none of the targets. Experts that are codes become a base: gradients of
    their inputs pass through them, to adapters of other matrices and their own.
    """
    model = _copied(model)
    for experts in experts_of(model):
        for matrix in (experts.up, experts.down):
            if isinstance(matrix, PackedMatrix):
                matrix.is_base = True
    chosen = [site for site in adapter_sites(model) if site.target in lora.targets]
    if not chosen:
        raise ValueError(
            f"LoRAConfig.targets={lora.targets}: the model of pattern {model.config.pattern!r} has "
            "none of these"
        )
    for number, site in enumerate(chosen):
        matrix = getattr(site.module, site.matrix)
        *leading, rows, columns = matrix.shape
        a = None
        if site.shares is None:
            bound = rows**-0.5
            shape = (*leading, rows, lora.rank)
            a = jax.random.uniform(
                jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound
            )
        b = jnp.zeros((*leading, lora.rank, columns), jnp.float32)
        adapter = LowRank(a, b, matrix.axes, lora.scale, lora.dropout)
        setattr(site.module, site.adapter, nnx.data(adapter))
    return model


def abstract_adapted(
    config: ModelConfig, lora: LoRAConfig | None, dtype: str | None = None
) -> Nemotron:
    """Shapes of a model with its adapters, its base as a run holds it, but for another `dtype` of
    its matrices; float32 and no adapters where there is no config of any."""
    if lora is None:
        return abstract_model(config, dtype or "float32")

    def adapted(model: Nemotron) -> Nemotron:
        return add_adapters(as_base(model, lora), lora, jax.random.key(0))

    return jax.eval_shape(adapted, abstract_model(config, dtype or lora.base_dtype))


def as_base(model: Nemotron, lora: LoRAConfig) -> Nemotron:
    """The model with its routed experts as the base of adapters holds them."""
    return pack_experts(model) if lora.base_experts == "nvfp4" else model


def merge_adapters(model: Nemotron) -> Nemotron:
    """The model with every adapter's change in its matrix, in the matrix's dtype, and none left.

    Raises ValueError where one is to be added to codes.
    """
    model = _copied(model)
    sites = [site for site in adapter_sites(model) if getattr(site.module, site.adapter)]
    for site in sites:
        if isinstance(getattr(site.module, site.matrix), PackedMatrix):
            raise ValueError(
                f"merge_adapters: {site.name} are NVFP4 codes, which hold no change; merge the "
                "adapters of unpacked(model)"
            )
    changes = [site_change(site) for site in sites]
    for site, change in zip(sites, changes, strict=True):
        old = getattr(site.module, site.matrix)
        merged = (old[...].astype(jnp.float32) + change).astype(old[...].dtype)
        setattr(site.module, site.matrix, nnx.Param(merged, axes=old.axes))
        setattr(site.module, site.adapter, nnx.data(None))
    return model


def without_adapters(model: Nemotron) -> Nemotron:
    """The base of a model's adapters alone."""
    model = _copied(model)
    for site in adapter_sites(model):
        setattr(site.module, site.adapter, nnx.data(None))
    return model


def site_change(site: Site) -> Array:
    """What a site's adapter adds to its matrix, float32."""
    shared = None if site.shares is None else getattr(site.shares, site.adapter).a
    return getattr(site.module, site.adapter).product(shared)


def has_adapters(model: Nemotron) -> bool:
    """Whether some matrix has one."""
    return any(getattr(site.module, site.adapter) for site in adapter_sites(model))


def adapter_names(model: Nemotron) -> set[str]:
    """The dotted names of the factors of adapters."""
    return {name for name, one in variables(model).items() if isinstance(one, Adapter)}


def adapter_sites(model: Nemotron) -> Iterator[Site]:
    """Every matrix of the trunk that an adapter can go on, those of a stack as one."""
    for letter, kind in BLOCK_KINDS.items():
        stack = getattr(model, kind)
        if stack is not None:
            yield from _sites(letter, f"{kind}.mixer", stack.mixer)


def _sites(letter: str, path: str, mixer: nnx.Module) -> Iterator[Site]:
    if letter == "M":
        yield from _linears("mamba_in", path, mixer, ("z", "x", "b", "c", "dt"), shared=True)
        yield from _linears("mamba_out", path, mixer, ("out",))
    elif letter == "*":
        yield from _linears("attention", path, mixer, ("q", "k", "v", "out"))
    elif letter == "-":
        yield from _linears("mlp", path, mixer, ("up", "down"))
    elif letter == "E":
        if mixer.latent_down is not None:
            yield from _linears("latent", path, mixer, ("latent_down", "latent_up"))
        yield from _linears("shared", f"{path}.shared", mixer.shared, ("up", "down"))
        for name in ("up", "down"):
            site = Site(f"{path}.experts.{name}", "experts", mixer.experts, name, f"{name}_adapter")
            yield site
    else:
        raise ValueError(
            f"adapter_sites: blocks {letter!r} ({path}) have no list of matrices; write one here"
        )


def _linears(
    target: str, path: str, owner: nnx.Module, names: Sequence[str], *, shared: bool = False
) -> Iterator[Site]:
    first = getattr(owner, names[0])
    for name in names:
        linear = getattr(owner, name)
        shares = first if shared and linear is not first else None
        yield Site(f"{path}.{name}.weight", target, linear, "weight", "adapter", shares)


def _copied(model: Nemotron) -> Nemotron:
    """New modules around the same arrays: what is built on them leaves the given model alone."""
    return jax.tree.map(lambda leaf: leaf, model)
