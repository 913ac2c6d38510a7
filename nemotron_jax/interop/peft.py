"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Linears have the hub's names, routed experts the per-expert names that vLLM reads. PEFT's own layout
of experts, `target_parameters`, is neither written nor read.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model.adapters import Site, adapter_sites, add_adapters
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The hub's names begin with backbone., transformers' modules with model.
_KEY = re.compile(r"base_model\.model\.(?:backbone|model)\.(layers\..+)\.lora_([AB])\.weight")
# Settings of PEFT that change what an adapter computes, with the values that are understood.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "lora_bias": (False, None),
}


def save_adapter(model: Nemotron, path: str | os.PathLike, *, base: str = "") -> None:
    """Write a model's adapters into the directory `path`; `base` names the model they belong to.

    Raises ValueError when the model has none.
    """
    sites = {s.name: s for s in adapter_sites(model) if getattr(s.module, s.adapter)}
    if not sites:
        raise ValueError("save_adapter: the model has no adapters; add some, or save the model")
    tensors, modules = {}, set()
    for tensor in _adapted(model, sites):
        owner = tensor.name.removesuffix(".weight")
        modules.add(owner.rsplit(".", 1)[1])
        first = _factors(sites, tensor.parameters[0])[0]
        seconds = [_factors(sites, name)[1] for name in tensor.parameters]
        tensors[f"{PREFIX}{owner}.lora_A.weight"] = _array(first[tensor.index].T)
        joined = np.concatenate([_array(b[tensor.index]) for b in seconds], axis=-1)
        tensors[f"{PREFIX}{owner}.lora_B.weight"] = _array(joined.T)
    site = next(iter(sites.values()))
    adapter = getattr(site.module, site.adapter)
    rank = adapter.b.shape[-2]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / TENSOR_FILE, metadata={"format": "pt"})
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: Nemotron, path: str | os.PathLike) -> Nemotron:
    """The model with the adapters of a directory that PEFT or `save_adapter` wrote.

    Raises ValueError for settings beside plain LoRA, for tensors of modules that the model has not,
    and for shapes that do not fit.
    """
    directory = Path(path)
    config = _read_config(directory / CONFIG_FILE)
    file = SafetensorsFile(directory / TENSOR_FILE)
    found: dict[str, dict[str, str]] = {}
    for key in file.entries:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file.path}: {key!r} is no LoRA factor of a layer's module")
        found.setdefault(f"backbone.{match[1]}.weight", {})[match[2]] = key
    all_sites = {site.name: site for site in adapter_sites(model)}
    tensors = {t.name: t for t in _adapted(model, all_sites) if t.name in found}
    if unknown := sorted(found.keys() - tensors.keys()):
        raise ValueError(f"{file.path}: the model has no module for {unknown[0]!r}")
    targets = {all_sites[t.parameters[0]].target for t in tensors.values()}
    lora = LoRAConfig(config["r"], config["alpha"], tuple(sorted(targets)))
    model = add_adapters(model, lora, jax.random.key(0))
    sites = {s.name: s for s in adapter_sites(model) if getattr(s.module, s.adapter)}
    new = {name: [np.array(f[...]) for f in _factors(sites, name)] for name in sites}
    for name, tensor in tensors.items():
        if found[name].keys() != {"A", "B"}:
            raise ValueError(f"{file.path}: {name!r} has one factor and not both")
        a, b = (file.read(found[name][part]).astype(np.float32).T for part in "AB")
        _fill(new, tensor, a, b, file.path)
    for name, (a, b) in new.items():
        adapter = getattr(sites[name].module, sites[name].adapter)
        if adapter.a is not None:
            adapter.a = nnx.Param(jnp.asarray(a), axes=adapter.a.axes)
        adapter.b = nnx.Param(jnp.asarray(b), axes=adapter.b.axes)
    return model


def _fill(new: dict, tensor: HubTensor, a: np.ndarray, b: np.ndarray, path: Path) -> None:
    """One hub module's factors, input-first, into ours."""
    first = new[tensor.parameters[0]][0][tensor.index]
    seconds = [new[name][1][tensor.index] for name in tensor.parameters]
    width = sum(second.shape[1] for second in seconds)
    if a.shape != first.shape or b.shape != (first.shape[1], width):
        raise ValueError(
            f"{path}: the factors of {tensor.name!r} are {a.T.shape} and {b.T.shape}; the model "
            f"and rank need {first.T.shape} and {(width, first.shape[1])}"
        )
    first[...] = a
    start = 0
    for second in seconds:
        second[...] = b[:, start : start + second.shape[1]]
        start += second.shape[1]


def _adapted(model: Nemotron, sites: dict[str, Site]) -> Iterator[HubTensor]:
    """The hub tensors that are matrices of the sites."""
    for tensor in hub_tensors(model.config, set(flatten(model))):
        if tensor.parameters[0] in sites:
            yield tensor


def _factors(sites: dict[str, Site], name: str) -> tuple[nnx.Param, nnx.Param]:
    site = sites[name]
    adapter = getattr(site.module, site.adapter)
    owner = adapter if site.shares is None else getattr(site.shares, site.adapter)
    return owner.a, adapter.b


def _array(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); name an adapter's folder") from None
    for name, allowed in _PLAIN.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"{path}: {name}={config[name]!r} is not understood; merge the adapter with PEFT "
                "and load the merged model"
            )
    # rank-stabilised LoRA divides by the root; as an alpha of ours that is alpha · √r / r
    return {"r": rank, "alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha}
