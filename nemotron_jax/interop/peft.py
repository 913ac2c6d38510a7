"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Linears have the hub's names. The factors of a layer's routed experts are two fused arrays a matrix,
which PEFT puts on the parameters that `target_parameters` names, or one pair an expert, which vLLM
reads. Both are written and read.
"""

import dataclasses
import functools
import json
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
from safetensors.numpy import save

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.untrusted import shown
from nemotron_jax.files import atomic_writer
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.peft_checks import check_complete, warn_of_other_base
from nemotron_jax.interop.peft_config import CONFIG_FILE, AdapterConfig, read_adapter_config
from nemotron_jax.interop.safetensors_file import SafetensorsFile, is_finite
from nemotron_jax.layers.low_rank import Adapter
from nemotron_jax.model.adapters import Site, adapter_sites, add_adapters
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten

TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_FLOATS = ("float64", "float32", "float16", "bfloat16")  # in which factors are stored
PREFIX = "base_model.model."
LAYOUTS = ("peft", "vllm")
# The hub's names begin with backbone., transformers' modules with model. PEFT wraps a module once
# for each of its parameters, the first innermost, as `base_layer` of the next.
_KEY = re.compile(
    r"base_model\.model\.(?:backbone|model)\.(layers\..+?)((?:\.base_layer)*)\.lora_([AB])\.weight"
)
_EXPERT = re.compile(r"(.+\.mixer\.experts)\.(\d+)\.(\w+)")
_EXPERT_PARAMETERS = ("up_proj", "down_proj")  # in the order of transformers' module


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
    config = _config(next(iter(sites.values())), base, modules, parameters)
    with atomic_writer(Path(path) / TENSOR_FILE) as out:
        out.write(save(tensors, metadata={"format": "pt"}))
    with atomic_writer(Path(path) / CONFIG_FILE) as out:
        out.write((json.dumps(config, indent=2) + "\n").encode())


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
    for modules that the settings name and the file lacks, and for factors that do not fit or are
    no numbers. Warns where the adapter was trained on another model by name.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"load_adapter: path={shown(path)} must be a directory's name")
    directory = Path(path)
    config = read_adapter_config(directory / CONFIG_FILE)
    file = _open(directory)
    num_experts = model.config.moe.num_experts if model.config.moe else 0
    found = _found(file, config, num_experts)
    all_sites = {site.name: site for site in adapter_sites(model)}
    known = {tensor.name: tensor for tensor in _adapted(model, all_sites)}
    if unknown := sorted(found.keys() - known.keys()):
        raise ValueError(f"{file.path}: the model has no module for {shown(unknown[0])}")
    check_complete(config, file.path, found, known)
    tensors = {name: tensor for name, tensor in known.items() if name in found}
    targets = {all_sites[t.parameters[0]].target for t in tensors.values()}
    lora = LoRAConfig(config.rank, config.alpha, tuple(sorted(targets)))
    # Of shapes alone at first: a rank that no file has would take all memory.
    shapes = jax.eval_shape(lambda model: add_adapters(model, lora, jax.random.key(0)), model)
    sites = {s.name: s for s in adapter_sites(shapes) if getattr(s.module, s.adapter)}
    for name, tensor in tensors.items():
        _check_shapes(found[name], tensor, sites, file.path)
    model = add_adapters(model, lora, jax.random.key(0))
    sites = {s.name: s for s in adapter_sites(model) if getattr(s.module, s.adapter)}
    new = {name: [np.array(f[...]) for f in _factors(sites, name)] for name in sites}
    for name, tensor in tensors.items():
        a, b = (_finite(found[name][part], file.path, name).T for part in "AB")
        _fill(new, tensor, a, b)
    for name, (a, b) in new.items():
        adapter = getattr(sites[name].module, sites[name].adapter)
        if adapter.a is not None:
            adapter.a = Adapter(jnp.asarray(a), axes=adapter.a.axes)
        adapter.b = Adapter(jnp.asarray(b), axes=adapter.b.axes)
    warn_of_other_base(config.base, model.origin, directory)
    return model


def _open(directory: Path) -> SafetensorsFile:
    if not (directory / TENSOR_FILE).exists() and (directory / PICKLE_FILE).exists():
        raise ValueError(
            f"{directory / TENSOR_FILE} is missing, and {PICKLE_FILE} is a pickle, which may run "
            "code and is not read; save the adapter with safe_serialization=True"
        )
    return SafetensorsFile(directory / TENSOR_FILE)


@dataclasses.dataclass(frozen=True)
class _Factor:
    """One factor, output-first, as the file's header has it, and what reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


_Found = dict[str, dict[str, _Factor]]  # by the hub's tensor and by part, A or B


def _found(file: SafetensorsFile, config: AdapterConfig, num_experts: int) -> _Found:
    """Each hub tensor's factors; those of fused experts one by one."""
    found: _Found = {}
    read = functools.lru_cache(maxsize=4)(file.read)  # of a fused factor every expert reads a part
    for key, entry in file.entries.items():
        match = _KEY.fullmatch(key)
        if match is None or len(entry.shape) != 2 or entry.dtype.name not in _FLOATS:
            raise ValueError(
                f"{file.path}: {shown(key)} of shape {shown(entry.shape)} and dtype "
                f"{entry.dtype.name} is no LoRA factor of a layer's module"
            )
        module, part, depth = match[1], match[3], match[2].count(".base_layer")
        if not module.endswith(".mixer.experts"):
            if depth:
                raise ValueError(
                    f"{file.path}: {shown(key)} adapts a module twice; merge it with PEFT"
                )
            factor = _Factor(entry.shape, functools.partial(read, key))
            found.setdefault(f"backbone.{module}.weight", {})[part] = factor
            continue
        name = _fused_parameter(config.parameters, f"model.{module}", depth)
        shape, rank = entry.shape, config.rank
        if name is None or shape["AB".index(part)] != rank * num_experts:
            raise ValueError(
                f"{file.path}: {shown(key)} of shape {shape} does not fit target_parameters="
                f"{shown(list(config.parameters))}, {num_experts} experts and rank {rank}"
            )
        one = (rank, shape[1]) if part == "A" else (shape[0], rank)
        for expert in range(num_experts):
            owner = f"backbone.{module}.{expert}.{name}.weight"
            take = functools.partial(_of_expert, read, key, part, expert, num_experts)
            found.setdefault(owner, {})[part] = _Factor(one, take)
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


def _check_shapes(
    factors: dict[str, _Factor], tensor: HubTensor, sites: dict[str, Site], path: Path
) -> None:
    if factors.keys() != {"A", "B"}:
        raise ValueError(f"{path}: {tensor.name!r} has one factor and not both")
    lead = len(tensor.index)
    inputs, rank = _factors(sites, tensor.parameters[0])[0].shape[lead:]
    outputs = sum(_factors(sites, name)[1].shape[-1] for name in tensor.parameters)
    a, b = factors["A"].shape, factors["B"].shape
    if a != (rank, inputs) or b != (outputs, rank):
        raise ValueError(
            f"{path}: the factors of {tensor.name!r} are {a} and {b}; the model and rank need "
            f"{(rank, inputs)} and {(outputs, rank)}"
        )


def _finite(factor: _Factor, path: Path, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = factor.read().astype(np.float32)
    if not is_finite(values.reshape(-1)):
        raise ValueError(
            f"{path}: a factor of {name!r} holds NaN or infinity; the training that wrote it failed"
        )
    return values


def _fill(new: dict, tensor: HubTensor, a: np.ndarray, b: np.ndarray) -> None:
    """One hub module's factors, input-first, into ours."""
    new[tensor.parameters[0]][0][tensor.index] = a
    start = 0
    for name in tensor.parameters:
        second = new[name][1][tensor.index]
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
