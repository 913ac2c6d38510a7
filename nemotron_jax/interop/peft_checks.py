"""Whether an adapter's file has all that its settings promise, and belongs to the model at hand."""

import re
import warnings
from collections.abc import Collection
from pathlib import Path

from nemotron_jax.config.untrusted import shown
from nemotron_jax.interop.peft_config import CONFIG_FILE, AdapterConfig
from nemotron_jax.types import Origin

_EXPERT = re.compile(r"layers\.\d+\.mixer\.experts\.\d+\.(\w+)")


def check_complete(
    config: AdapterConfig, path: Path, found: Collection[str], known: Collection[str]
) -> None:
    """Raise ValueError where the file lacks factors that its settings name, or has others.

    `found` are the hub tensors that the file has factors of, `known` all that could have some.
    Where the settings name no modules one by one, layers that differ from others of their kind are
    a warning.
    """
    has, all_modules = ({_module(name) for name in names} for names in (found, known))
    if not has:
        raise ValueError(f"{path}: the file holds no factors; save the adapter again")
    if config.modules is None:
        _warn_of_uneven_layers(config, path, has, all_modules)
        return
    of_parameters = {module for module in all_modules if _wants_parameter(config, module)}
    named = _by_name(config, all_modules - of_parameters)
    wanted = {module for module in of_parameters if config.has_layer(module)}
    for modules in named.values():
        # A name such as up_proj may mean several kinds: in transformers experts are no modules,
        # and vLLM's files name shared experts and dense layers alike.
        kinds = {_kind(module) for module in modules & has}
        wanted |= {module for module in modules if not kinds or _kind(module) in kinds}
    if missing := sorted(wanted - has):
        raise ValueError(
            f"{path}: {len(missing)} of the {len(wanted)} modules that {CONFIG_FILE} names have no "
            f"factors here, {missing[0]} for one; the file is not whole: copy it again"
        )
    if extra := sorted(has - wanted - of_parameters):
        raise ValueError(
            f"{path}: holds factors of {len(extra)} modules that {CONFIG_FILE} does not name, "
            f"{extra[0]} for one; take both files of one adapter"
        )


def _by_name(config: AdapterConfig, modules: Collection[str]) -> dict[str, set[str]]:
    """The modules that each name of the settings means."""
    named: dict[str, set[str]] = {}
    for module in modules:
        for name in config.names_of(module):
            named.setdefault(name, set()).add(module)
    return named


def warn_of_other_base(base: str, origin: Origin | None, directory: Path) -> None:
    """A warning where the adapter says that it belongs to another model, or to one whose name the
    model at hand does not have. Names are compared, as there is nothing else to compare."""
    home = (origin.hub or origin.directory) if origin is not None else ""
    if not base or (home and Path(base).exists() and Path(base).resolve() == Path(home)):
        return
    wanted = _words(base)
    if home and any(_may_be_one(wanted, words) for words in _names_of(home)):
        return
    here = f"comes from {home}" if home else "has no name"
    warnings.warn(
        f"{directory}: the adapter was trained on {shown(base)}, and this model {here}; on another "
        "base than its own it means nothing",
        stacklevel=3,
    )


def _module(name: str) -> str:
    return name.removeprefix("backbone.").removesuffix(".weight")


def _kind(module: str) -> str:
    """A module's name without the numbers of its layer and expert."""
    return re.sub(r"\.\d+\.", ".", module)


def _wants_parameter(config: AdapterConfig, module: str) -> bool:
    """Whether an expert's matrix is a part of one of the fused parameters that have factors."""
    match = _EXPERT.fullmatch(module)
    if match is None:
        return False
    fused = f".model.{module.rsplit('.', 2)[0]}.{match[1]}"
    return any(fused.endswith(f".{target}") for target in config.parameters)


def _warn_of_uneven_layers(
    config: AdapterConfig, path: Path, has: set[str], known: set[str]
) -> None:
    kinds = {_kind(module) for module in has}
    alike = {m for m in known if _kind(m) in kinds and config.has_layer(m)}
    if missing := sorted(alike - has):
        warnings.warn(
            f"{path}: {len(missing)} modules have no factors while others of their kind do, "
            f"{missing[0]} for one; check that the file is whole",
            stacklevel=4,
        )


def _words(name: str) -> set[str]:
    """The words of the last part of a model's name or path."""
    return set(re.findall(r"[a-z0-9]+", Path(name).name.lower()))


def _may_be_one(words: set[str], others: set[str]) -> bool:
    """Whether two names can be one model's: one is short for the other."""
    is_base = {"base"} & words == {"base"} & others
    return is_base and bool(words and others) and (words <= others or others <= words)


def _names_of(home: str) -> list[set[str]]:
    """The words of the names that a directory gives a model: its own, or, in a cache of the hub,
    `models--owner--name` above its snapshots."""
    parts = Path(home).parts
    cached = [part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")]
    return [_words(name) for name in (parts[-1], *cached)]
