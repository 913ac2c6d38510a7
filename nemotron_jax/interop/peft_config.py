"""adapter_config.json, as PEFT 0.15 to 0.21 write it: what is read, what is harmless, and what says
that the adapter is no plain LoRA.

A setting that is in none of the lists is refused where it is set to something, since it may change
what the factors mean.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_jax.config.checks import is_finite, is_integer
from nemotron_jax.config.untrusted import read_object, shown

CONFIG_FILE = "adapter_config.json"
_HINT = "name the directory of an adapter that PEFT saved"
_LARGEST_SCALE = 3e38  # of alpha / r: float32 holds no more

_READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "target_parameters",
    "base_model_name_or_path",
}
# Whatever they say: they steer training, the first values of the factors, or who loads the file.
_HARMLESS = {
    "auto_mapping",
    "corda_config",  # like the other three: counts where init_lora_weights asks for its method
    "eva_config",
    "lora_ga_config",
    "loftq_config",
    "ensure_weight_tying",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_OFF = (None, False, "", [], {})
# Those that change what an adapter computes, with the values that mean plain LoRA.
_PLAIN: Mapping[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
    "bias": ("none", None),
    # Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights as well, which the file
    # does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "layers_pattern": (*_OFF, "layers", ["layers"]),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What the file says: rank, the alpha that we would give, and which modules have factors.

    `modules` is None where they cannot be listed: chosen by a regular expression, which is not
    evaluated, or not named at all.
    """

    rank: int
    alpha: float
    base: str
    modules: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    parameters: tuple[str, ...]

    def names_of(self, module: str) -> set[str]:
        """Those of `modules` that name a module of the trunk, as `layers.3.mixer.q_proj`."""
        if self.modules is None or not self.has_layer(module):
            return set()
        endings = _endings(module)
        return set() if endings & set(self.excluded) else endings & set(self.modules)

    def has_layer(self, module: str) -> bool:
        """Whether the module's layer is one of those that were adapted."""
        return self.layers is None or int(module.split(".")[1]) in self.layers


def read_adapter_config(path: Path) -> AdapterConfig:
    """The file's settings. Raises ValueError, naming it, for any that is not understood."""
    keys = read_object(path, _HINT)
    _refuse_variants(keys, path)
    rank, alpha = keys.get("r"), keys.get("lora_alpha")
    _check(path, "r", rank, is_integer(rank) and 1 <= rank < 2**31, "must be an integer from 1 on")
    fits = is_finite(alpha) and 0 < alpha / rank < _LARGEST_SCALE
    _check(path, "lora_alpha", alpha, fits, "must be a positive number")
    # rank-stabilised LoRA divides by the root; as an alpha of ours that is alpha · √r / r
    by_root = keys.get("use_rslora", False)
    _check(path, "use_rslora", by_root, by_root in (True, False, None), "must be true or false")
    alpha = float(alpha) * math.sqrt(rank) if by_root else float(alpha)
    dropout = keys.get("lora_dropout", 0.0)
    fits = dropout is None or is_finite(dropout) and 0 <= dropout <= 1
    _check(path, "lora_dropout", dropout, fits, "must be a share from 0 to 1")
    parameters = _names(keys, "target_parameters", path)
    base, excluded = keys.get("base_model_name_or_path"), keys.get("exclude_modules")
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        base=base if isinstance(base, str) else "",
        modules=_modules(keys, parameters, path),
        excluded=() if _is_pattern(excluded) else _names(keys, "exclude_modules", path),
        layers=_layers(keys.get("layers_to_transform"), path),
        parameters=parameters,
    )


def _refuse_variants(keys: Mapping[str, Any], path: Path) -> None:
    for name, value in keys.items():
        if name in _READ or name in _HARMLESS:
            continue
        value = value.lower() if name == "init_lora_weights" and isinstance(value, str) else value
        if value in _PLAIN.get(name, _OFF) or _patterns_say_nothing(keys, name):
            continue
        raise ValueError(
            f"{path}: {shown(name)[1:-1]}={shown(value)} is not understood; merge the adapter with "
            "PEFT and load the merged model"
        )


def _patterns_say_nothing(keys: Mapping[str, Any], name: str) -> bool:
    """Whether ranks or alphas of single modules are all the adapter's own."""
    own = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}.get(name)
    values = keys[name]
    return (
        own is not None
        and isinstance(values, dict)
        and set(map(repr, values.values())) == {repr(keys.get(own))}
    )


def _modules(
    keys: Mapping[str, Any], parameters: tuple[str, ...], path: Path
) -> tuple[str, ...] | None:
    modules = keys.get("target_modules")
    if _is_pattern(modules) or _is_pattern(keys.get("exclude_modules")):
        return None
    if modules is None and not parameters:  # PEFT has a list of its own then
        return None
    return _names(keys, "target_modules", path)


def _is_pattern(names: object) -> bool:
    """Whether modules are chosen by a regular expression, or as `all-linear`."""
    return isinstance(names, str) and not re.fullmatch(r"[\w.]*", names)


def _names(keys: Mapping[str, Any], name: str, path: Path) -> tuple[str, ...]:
    value = keys.get(name)
    value = [] if value in (None, "") else [value] if isinstance(value, str) else value
    known = isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
    _check(path, name, value, known, "must be a list of names")
    return tuple(value)


def _layers(value: object, path: Path) -> frozenset[int] | None:
    listed = [value] if is_integer(value) else value
    if listed is None or listed == []:
        return None
    known = isinstance(listed, list) and all(is_integer(layer) for layer in listed)
    _check(path, "layers_to_transform", value, known, "must be a layer's number or a list of them")
    return frozenset(listed)


def _check(path: Path, name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"{path}: {name}={shown(value)} {rule}")


def _endings(module: str) -> set[str]:
    """All names by which PEFT finds a module: its own, and every end of it behind a dot. The hub's
    trunk is called backbone, transformers' model."""
    parts = module.split(".")
    ends = {".".join(parts[start:]) for start in range(len(parts))}
    return ends | {f"backbone.{module}", f"model.{module}"}
