"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Linears have the hub's names. The factors of a layer's routed experts are two fused arrays a matrix,
which PEFT puts on the parameters that `target_parameters` names, or one pair an expert, which vLLM
reads. Both are written and read.
"""

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model.adapters import Site, adapter_sites, add_adapters
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYOUTS = ("peft", "vllm")
# The hub's names begin with backbone., transformers' modules with model. PEFT wraps a module once
# for each of its parameters, the first innermost, as `base_layer` of the next.
_KEY = re.compile(
    r"base_model\.model\.(?:backbone|model)\.(layers\..+?)((?:\.base_layer)*)\.lora_([AB])\.weight"
)
_EXPERT = re.compile(r"(.+\.mixer\.experts)\.(\d+)\.(\w+)")
_EXPERT_PARAMETERS = ("up_proj", "down_proj")  # in the order of transformers' module
# Settings of PEFT that change what an adapter computes, with the values that are understood.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": ([], None),
    "trainable_token_indices": ([], None),
}


def save_adapter(
    model: Nemotron, path: str | os.PathLike, *, base: str = "", layout: str = "peft"
) -> None:
    """Write a model's adapters into the directory `path`; `base` names the model they belong to.

    `layout` is that of routed experts: "peft" fuses them, "vllm" names each. PEFT loads no adapter
    of a Mamba layer's output projection (target `mamba_out`) onto this family: a warning. Raises
    ValueError when the model has no adapters.
    """
    known = layout in LAYOUTS
    check_value("save_adapter", "layout", layout, known, f"must be one of {', '.join(LAYOUTS)}")
    sites = {s.name: s for s in adapter_sites(model) if getattr(s.module, s.adapter)}
    if not sites:
        raise ValueError("save_adapter: the model has no adapters; add some, or save the model")
    tensors: dict[str, np.ndarray] = {}
    modules, parameters = set(), set()
    for tensor in _adapted(model, sites):
        owner = tensor.name.removesuffix(".weight")
        first = _factors(sites, tensor.parameters[0])[0]
        seconds = [_factors(sites, name)[1] for name in tensor.parameters]
        expert = _EXPERT.fullmatch(owner)
        if layout == "peft" and expert is not None:
            parameters.add(f"mixer.experts.{expert[3]}")
            if expert[2] == "0":
                layer = tensor.index[0]
                tensors |= _fused(expert[1], expert[3], first[layer], seconds[0][layer])
            continue
        modules.add(_target(owner) if layout == "peft" else owner.rsplit(".", 1)[1])
        tensors[f"{PREFIX}{owner}.lora_A.weight"] = _array(first[tensor.index].T)
        joined = np.concatenate([_array(b[tensor.index]) for b in seconds], axis=-1)
        tensors[f"{PREFIX}{owner}.lora_B.weight"] = _array(joined.T)
    if layout == "peft" and "out_proj" in modules:
        warnings.warn(
            "save_adapter: PEFT refuses adapters of a Mamba layer's out_proj on this family; merge "
            "them, or train without the target mamba_out, to load the model there",
            stacklevel=2,
        )
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / TENSOR_FILE, metadata={"format": "pt"})
    config = _config(next(iter(sites.values())), base, modules, parameters)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _config(site: Site, base: str, modules: set[str], parameters: set[str]) -> dict[str, Any]:
    """adapter_config.json of adapters that are all like the site's."""
    adapter = getattr(site.module, site.adapter)
    rank = adapter.b.shape[-2]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    return config | ({"target_parameters": sorted(parameters)} if parameters else {})


def load_adapter(model: Nemotron, path: str | os.PathLike) -> Nemotron:
    """The model with the adapters, without dropout, of a directory that PEFT or we wrote.

    Raises ValueError for settings beside plain LoRA, for tensors of modules that the model has not,
    and for shapes that do not fit.
    """
    directory = Path(path)
    config = _read_config(directory / CONFIG_FILE)
    file = SafetensorsFile(directory / TENSOR_FILE)
    num_experts = model.config.moe.num_experts if model.config.moe else 0
    found = _found(file, config, num_experts)
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
        a, b = (found[name][part]().astype(np.float32).T for part in "AB")
        _fill(new, tensor, a, b, file.path)
    for name, (a, b) in new.items():
        adapter = getattr(sites[name].module, sites[name].adapter)
        if adapter.a is not None:
            adapter.a = nnx.Param(jnp.asarray(a), axes=adapter.a.axes)
        adapter.b = nnx.Param(jnp.asarray(b), axes=adapter.b.axes)
    return model


_Readers = dict[str, dict[str, Callable[[], np.ndarray]]]


def _found(file: SafetensorsFile, config: dict[str, Any], num_experts: int) -> _Readers:
    """By the hub's tensor, what reads its factors; those of fused experts one by one."""
    found: _Readers = {}
    read = functools.lru_cache(maxsize=4)(file.read)  # of a fused factor every expert reads a part
    for key in file.entries:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file.path}: {key!r} is no LoRA factor of a layer's module")
        module, part, depth = match[1], match[3], match[2].count(".base_layer")
        if not module.endswith(".mixer.experts"):
            if depth:
                raise ValueError(f"{file.path}: {key!r} adapts a module twice; merge it with PEFT")
            found.setdefault(f"backbone.{module}.weight", {})[part] = functools.partial(read, key)
            continue
        name = _fused_parameter(config["target_parameters"], f"model.{module}", depth)
        shape, rank = file.entries[key].shape, config["r"]
        if name is None or shape["AB".index(part)] != rank * num_experts:
            raise ValueError(
                f"{file.path}: {key!r} of shape {shape} does not fit target_parameters="
                f"{config['target_parameters']}, {num_experts} experts and rank {rank}"
            )
        for expert in range(num_experts):
            owner = f"backbone.{module}.{expert}.{name}.weight"
            found.setdefault(owner, {})[part] = functools.partial(
                _of_expert, read, key, part, expert, num_experts
            )
    return found


def _fused_parameter(targets: Sequence[str], module: str, depth: int) -> str | None:
    """Which of a module's parameters PEFT adapts `depth` wrappers below the outermost."""
    wrapped = [
        name
        for name in _EXPERT_PARAMETERS
        if any(f".{module}.{name}".endswith(f".{target}") for target in targets)
    ]
    return wrapped[-1 - depth] if depth < len(wrapped) else None


def _fused(module: str, name: str, a: Any, b: Any) -> dict[str, np.ndarray]:
    """The two factors of all of a layer's experts as PEFT has them: A counts experts slowest, B
    fastest."""
    depth = len(_EXPERT_PARAMETERS) - 1 - _EXPERT_PARAMETERS.index(name)
    owner = f"{PREFIX}{module}{'.base_layer' * depth}"
    experts, inputs, rank = a.shape
    return {
        f"{owner}.lora_A.weight": _array(
            np.transpose(a, (0, 2, 1)).reshape(experts * rank, inputs)
        ),
        f"{owner}.lora_B.weight": _array(np.transpose(b, (2, 1, 0)).reshape(-1, rank * experts)),
    }


def _of_expert(read: Callable, key: str, part: str, expert: int, experts: int) -> np.ndarray:
    """One expert's factor, output-first, of a fused one."""
    factor = read(key)
    if part == "A":
        return factor.reshape(experts, -1, factor.shape[1])[expert]
    return factor.reshape(factor.shape[0], -1, experts)[:, :, expert]


def _target(owner: str) -> str:
    """A module's name for PEFT's target_modules, which match ends of names.

    Dense layers and shared experts both have an up_proj, of which only one may have adapters.
    """
    parts = owner.split(".")
    return ".".join(parts[-2:] if parts[-1] in _EXPERT_PARAMETERS else parts[-1:])


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
    fused = config.get("target_parameters") or []
    if not (isinstance(fused, list) and all(isinstance(name, str) for name in fused)):
        raise ValueError(f"{path}: target_parameters={fused!r} must be a list of names")
    # rank-stabilised LoRA divides by the root; as an alpha of ours that is alpha · √r / r
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return {"r": rank, "alpha": alpha, "target_parameters": fused}
