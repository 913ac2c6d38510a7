"""What a hub directory says of its quantisation: which modules are stored as codes, and how.

Model-Optimizer writes it into `hf_quant_config.json`, into config.json's `quantization_config`, or
into both; compressed-tensors into config.json alone.
"""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

from nemotron_jax.config.hub import text_config
from nemotron_jax.config.untrusted import read_object, shown

NVFP4, FP8 = "NVFP4", "FP8"  # how one matrix is stored
FILE = "hf_quant_config.json"
KEY = "quantization_config"  # of config.json
BLOCK = 16  # columns that share a scale of NVFP4; the format has no other

_HINT = "download it again, or load the model's bfloat16 checkpoint"
_MIXED = "MIXED_PRECISION"
# Model-Optimizer's names. The formats with 16-bit activations store weights in the same way.
_ALGORITHMS = {
    "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8,
}
_FORMATS = {"nvfp4-pack-quantized": NVFP4, "float-quantized": FP8}  # of compressed-tensors
_MIXED_FORMAT = "mixed-precision"
_GROUP_BITS = ((4, "float"), (8, "float"))  # num_bits and type of weights that are read
_MOST_NAME = 200  # characters; a module's name has fifty
_MOST_PATTERNS = 1000  # each is held against every module; published recipes have one


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The modules that are stored as codes.

    Without a list the files decide: the published ones of Super and Ultra name one algorithm for a
    model that mixes two with bfloat16.
    """

    file: Path
    algorithm: str  # of the whole, as the file names it; empty where nothing is quantised
    is_packed: bool  # compressed-tensors' names, `weight_packed` and a global divisor
    listed: dict[str, str]  # module -> NVFP4 or FP8; empty: no list
    excluded: frozenset[str]  # modules that are stored as floats
    patterns: tuple[tuple[str, str], ...] = ()  # the same of patterns of modules, "" for floats

    def expected(self, module: str) -> str | None:
        """How the recipe has a module stored: NVFP4, FP8, "" for floats, None where it leaves it
        to the files."""
        if module in self.listed:
            return self.listed[module]
        if module in self.excluded:
            return ""
        for pattern, how in self.patterns:
            if fnmatch.fnmatchcase(module, pattern):
                return how
        return "" if self.listed else None


def read_recipe(directory: Path, keys: dict[str, Any]) -> Recipe | None:
    """The recipe of a directory whose config.json holds `keys`; None where it is not quantised.

    Raises ValueError, naming the file and its key, for a format that is not read here, and where
    the two files list different modules.
    """
    config, separate = directory / "config.json", directory / FILE
    found = []
    for part in (keys, text_config(keys)):
        if part.get(KEY) is not None and not found:
            found.append(_parse(config, _object(config, KEY, part[KEY])))
    if separate.is_file():
        whole = read_object(separate, _HINT)
        named = whole.get("quantization", whole)
        found.append(_parse(separate, _object(separate, "quantization", named)))
    if len(found) == 2 and all(r.listed for r in found) and found[0].listed != found[1].listed:
        differ = dict(found[0].listed.items() ^ found[1].listed.items())
        raise ValueError(
            f"{separate} and {config} list different modules ({shown(min(differ))} is one); "
            "one of them belongs to another checkpoint: download both again"
        )
    # The one that says more; where both do, config.json, which transformers and vLLM read first.
    return max(found, key=lambda recipe: bool(recipe.listed), default=None)


def _parse(file: Path, keys: dict[str, Any]) -> Recipe:
    if "compressed" in str(keys.get("quant_method")):
        return _parse_packed(file, keys)
    listed = {}
    for module, how in _object(file, "quantized_layers", keys.get("quantized_layers")).items():
        how = _object(file, f"quantized_layers[{shown(module)}]", how)
        if how.get("quant_algo") is not None:
            listed[_name(file, "quantized_layers", module)] = _algorithm(file, how)
    algorithm = keys.get("quant_algo")
    method = keys.get("quant_method", "modelopt")
    if method != "modelopt" and algorithm is None:
        raise ValueError(
            f"{file}: quant_method={shown(method)} is not read here (known: modelopt, "
            f"compressed-tensors); {_HINT}"
        )
    if algorithm is not None and algorithm != _MIXED:
        _algorithm(file, keys)
    groups = _check_groups(file, keys)
    excluded = [
        _name(file, key, name)
        for key in ("exclude_modules", "ignore")
        for name in _list(file, key, keys.get(key))
    ]
    patterns = [(name, how) for name, how in listed.items() if _is_pattern(name)]
    patterns += [(name, "") for name in excluded if _is_pattern(name)]
    if len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"{file}: {len(patterns)} patterns of modules; at most {_MOST_PATTERNS}")
    whole = str(algorithm) if algorithm is not None else _MIXED if listed or groups else ""
    exact = {name: how for name, how in listed.items() if not _is_pattern(name)}
    return Recipe(file, whole, False, exact, frozenset(excluded), tuple(patterns))


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _parse_packed(file: Path, keys: dict[str, Any]) -> Recipe:
    """Of compressed-tensors: its `ignore` may hold regular expressions, and the files decide."""
    groups = _check_groups(file, keys)
    named = [part.get("format") for part in (keys, *groups)]
    formats = [name for name in named if name is not None]
    for name in formats:
        if name not in (*_FORMATS, _MIXED_FORMAT):
            raise ValueError(
                f"{file}: format={shown(name)} is not read here (known: {', '.join(_FORMATS)}, "
                f"{_MIXED_FORMAT}); {_HINT}"
            )
    transforms = _object(file, "transform_config", keys.get("transform_config"))
    if transforms.get("config_groups"):
        raise ValueError(
            f"{file}: transform_config rotates weights or activations, which no layer here undoes; "
            f"{_HINT}"
        )
    if not formats:
        raise ValueError(f"{file}: no format is named beside quant_method; {_HINT}")
    ignored = [_name(file, "ignore", name) for name in _list(file, "ignore", keys.get("ignore"))]
    return Recipe(file, formats[0], True, {}, frozenset(ignored))


def _check_groups(file: Path, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of a recipe, their weights of a kind that is read here."""
    named = _object(file, "config_groups", keys.get("config_groups"))
    groups = [_object(file, f"config_groups[{shown(name)}]", g) for name, g in named.items()]
    for group in groups:
        weights = _object(file, "weights", group.get("weights"))
        bits = weights.get("num_bits"), weights.get("type", "float")
        if weights and bits not in _GROUP_BITS:
            raise ValueError(
                f"{file}: config_groups hold weights of num_bits={shown(bits[0])}, "
                f"type={shown(bits[1])}; 4-bit and 8-bit floats are read; {_HINT}"
            )
        if bits[0] == 4:
            _check_block(file, weights)
    _check_block(file, keys)
    return groups


def _algorithm(file: Path, keys: dict[str, Any]) -> str:
    name = keys.get("quant_algo")
    if not isinstance(name, str) or name not in _ALGORITHMS:
        raise ValueError(
            f"{file}: quant_algo={shown(name)} is not read here (known: "
            f"{', '.join((*_ALGORITHMS, _MIXED))}); {_HINT}"
        )
    if _ALGORITHMS[name] == NVFP4:
        _check_block(file, keys)
    return _ALGORITHMS[name]


def _check_block(file: Path, keys: dict[str, Any]) -> None:
    size = keys.get("group_size")
    if size is not None and size != BLOCK:
        raise ValueError(
            f"{file}: group_size={shown(size)}: NVFP4 has a scale for each {BLOCK} columns; {_HINT}"
        )


def _object(file: Path, key: str, value: object) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{file}: {key}={shown(value)} must be an object; {_HINT}")
    return value or {}


def _list(file: Path, key: str, value: object) -> list:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{file}: {key}={shown(value)} must be a list of modules; {_HINT}")
    return value or []


def _name(file: Path, key: str, name: object) -> str:
    """A module's name, or a pattern of them, under the hub's own names of the text model."""
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME:
        raise ValueError(f"{file}: {key} names {shown(name)}, which is no module; {_HINT}")
    name = name.removeprefix("language_model.")
    inner = name.removeprefix("model.")
    return name if inner == name else "backbone." + inner
