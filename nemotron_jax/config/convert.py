"""Configurations as ConfigDict (files and overrides) and as JSON (run directories)."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.run import RunConfig

Config = TypeVar("Config")


def _without_amax(values: dict) -> dict:
    """Version 2 takes largest magnitudes over all devices always, which was the default."""
    part: Any = values
    for name in ("execution", "precision", "nvfp4"):
        part = part.get(name) if isinstance(part, dict) else None
    if isinstance(part, dict):
        part.pop("amax", None)
    return values


def _without_rewards(values: dict) -> dict:
    """Version 3 leaves the controls of an experiment to that experiment."""
    part: Any = values
    for name in ("rl", "rollout"):
        part = part.get(name) if isinstance(part, dict) else None
    rewards = part.pop("rewards", "earned") if isinstance(part, dict) else "earned"
    if rewards != "earned":
        raise ValueError(
            f"RunConfig.rl.rollout.rewards={rewards!r}: a control is an arm of "
            "experiments/grpo_tiny.py now; begin it anew there"
        )
    return values


FORMAT_VERSION = 3
# Version n -> a function from a version-n dictionary to one of version n + 1.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {1: _without_amax, 2: _without_rewards}

_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def to_config_dict(config: Any) -> ConfigDict:
    """The dataclass as a ConfigDict of the same nesting, whose types guard command-line overrides.

    A scalar that is None becomes a placeholder of its type, so `--config.a.b=3` can fill it; a part
    that is None stays None. A run's schedule follows its steps.
    """
    result = ConfigDict()
    for name, kind in _field_types(type(config)).items():
        value = getattr(config, name)
        wanted, _ = _without_none(kind)
        if value is None:
            part = ConfigDict if dataclasses.is_dataclass(wanted) else wanted
            result[name] = config_dict.placeholder(typing.get_origin(part) or part)
        else:
            result[name] = to_config_dict(value) if dataclasses.is_dataclass(value) else value
    return _following_steps(result) if isinstance(config, RunConfig) else result


def from_config_dict(cls: type[Config], values: ConfigDict | Mapping) -> Config:
    """The checked dataclass that a ConfigDict or a plain dictionary describes.

    An integer serves where a number is wanted, a list where a tuple is; nothing else is converted.
    Absent keys take the dataclass's defaults. Raises ValueError with the full dotted path for an
    unknown key (naming the nearest valid one), an ill-typed value, a None that is not allowed and a
    missing key, and whatever the dataclass's own checks raise.
    """
    if cls is RunConfig:
        _check_followed(values)
    return _build(cls, values, cls.__name__)


def optional_parts(cls: type, path: str = "") -> set[str]:
    """Dotted names of the parts of a configuration that may be None, such as `model.mtp`."""
    found = set()
    for name, kind in _field_types(cls).items():
        wanted, optional = _without_none(kind)
        if dataclasses.is_dataclass(wanted):
            found |= {f"{path}{name}"} if optional else set()
            found |= optional_parts(wanted, f"{path}{name}.")
    return found


def to_json(config: RunConfig) -> str:
    """A run's configuration as strict JSON with its `format_version`, one key a line."""
    values = {"format_version": FORMAT_VERSION, **_encoded(dataclasses.asdict(config))}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> RunConfig:
    """The run's configuration that `to_json` wrote, now or in an earlier format version."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"RunConfig: the text is not JSON ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"RunConfig: a JSON object is needed, not {type(values).__name__}")
    version = values.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"RunConfig.format_version={version!r}: must be an integer from 1 to {FORMAT_VERSION}; "
            "a newer file needs a newer nemotron_jax"
        )
    for step in range(version, FORMAT_VERSION):
        values = MIGRATIONS[step](values)
    return _build(RunConfig, _decoded(values), "RunConfig")


def _check_followed(values: ConfigDict | Mapping) -> None:
    """Name a wrong number that the schedule follows, before the tokens that it leads to."""
    for part, field in (("training", "steps"), ("data", "batch_size"), ("data", "sequence_length")):
        kept = values.get(part) if isinstance(values, ConfigDict | Mapping) else None
        value = kept.get(field) if isinstance(kept, ConfigDict | Mapping) else None
        owner, ok = f"{part.capitalize()}Config", type(value) is not int or value >= 1
        check_value(owner, field, value, ok, "must be at least 1")


def _following_steps(config: ConfigDict) -> ConfigDict:
    """The run with a schedule that stretches with its steps and their size.

    `--config.training.steps=20` warms up, stays and decays within those 20 steps, each for the
    share of the run that it had. A field of the schedule that is set itself follows no more.
    """
    data, training = config.data, config.training
    tokens = training.get_ref("steps") * data.get_ref("batch_size")
    tokens = tokens * data.get_ref("sequence_length")
    for field in ("warmup_tokens", "decay_tokens", "total_tokens"):
        training.schedule[field] = tokens * training.schedule[field] // tokens.get()
    return config


def _build(cls: type[Config], values: Any, path: str) -> Config:
    if not isinstance(values, ConfigDict | Mapping):
        raise ValueError(f"{path}={values!r}: must be a dictionary of {cls.__name__}'s fields")
    field_types = _field_types(cls)
    for key in values:
        if key not in field_types:
            nearest = difflib.get_close_matches(str(key), field_types, n=1, cutoff=0.0)
            raise ValueError(f"{path}.{key}: unknown key; the nearest valid one is {nearest[0]!r}")
    arguments = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            kind = field_types[field.name]
            arguments[field.name] = _checked(kind, values[field.name], f"{path}.{field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}.{field.name}: is required and missing")
    return cls(**arguments)


def _checked(kind: Any, value: Any, path: str) -> Any:
    """The value as the annotated type, or a ValueError that names the path."""
    wanted, optional = _without_none(kind)
    if value is None:
        if not optional:
            raise ValueError(f"{path}=None: must have a value")
        return None
    if dataclasses.is_dataclass(wanted):
        return _build(wanted, value, path)
    if typing.get_origin(wanted) is tuple:
        return _checked_tuple(typing.get_args(wanted), value, path)
    if wanted is float and type(value) is int:
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{path}={value!r}: must be {_TYPE_NAMES[wanted]}")
    return value


def _checked_tuple(kinds: tuple, value: Any, path: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path}={value!r}: must be a tuple or a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{path}={value!r}: must have {len(kinds)} entries")
    return tuple(
        _checked(kind, entry, f"{path}[{index}]")
        for index, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The annotation without `None`, and whether it allowed it."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
    assert len(rest) == 1, f"a field holds one type or that type and None, not {kind}"
    return rest[0], len(rest) < len(typing.get_args(kind))


def _encoded(value: Any) -> Any:
    """JSON has no infinity: it is written as {"__float__": "Infinity"}, as hub files do."""
    if isinstance(value, dict):
        return {key: _encoded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    return value
