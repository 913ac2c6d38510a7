"""The safetensors files of a hub directory, their tensors under the names of the hub's own text
models."""

import dataclasses
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nemotron_jax.config.hub import text_config
from nemotron_jax.config.untrusted import read_object, shown
from nemotron_jax.interop.safetensors_file import SafetensorsFile, TensorEntry

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
OUTER = "language_model."  # before the names of a text model that is a part of another
_LISTED = 20  # files named of a long list
_TEXT_PARTS = ("backbone.", "model.", "lm_head.", "mtp.")


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """`files` hold the text model's entries alone; `others` are those of the model around it."""

    files: list[SafetensorsFile]
    others: dict[str, tuple[SafetensorsFile, TensorEntry]]
    prefix: str  # before every name of the text model, in the files
    trunk: str  # "backbone." or transformers' "model."

    def stored_name(self, name: str) -> str:
        """What the files call the hub's tensor `name`."""
        if name.startswith("backbone."):
            name = self.trunk + name.removeprefix("backbone.")
        return self.prefix + name


def open_hub(directory: Path, keys: dict[str, Any]) -> HubFiles:
    """The files of a directory whose config.json holds `keys`.

    Raises ValueError for an index that is none, that leads out of the directory or names files that
    are missing, and for files that are not whole.
    """
    index = directory / INDEX_FILE
    owner = _shards(index) if index.is_file() else {}
    names = sorted(set(owner.values())) or [SINGLE_FILE]
    missing = [name for name in names if not os.path.isfile(directory / name)]
    if missing:
        some = ", ".join(shown(name)[1:-1] for name in missing[:_LISTED])
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ValueError(f"{directory}: files are missing: {some}{more}; download them again")
    files = [SafetensorsFile(directory / name) for name in names]
    for name, file in zip(names, files, strict=True):
        # A copy of a tensor in a shard that the index does not name is stale.
        for tensor in [tensor for tensor in file.entries if owner.get(tensor, name) != name]:
            del file.entries[tensor]
    stored = {name for file in files for name in file.entries}
    others = {}
    if text_config(keys) is not keys:
        others = _take_others(files, stored)
        stored -= others.keys()
    prefix = OUTER if not any(name.startswith("backbone.") for name in stored) else ""
    inner = {name.removeprefix(prefix) for name in stored}
    prefix = prefix if inner != stored else ""
    has_backbone = any(name.startswith("backbone.") for name in inner)
    is_renamed = not has_backbone and any(name.startswith("model.") for name in inner)
    found = HubFiles(files, others, prefix, "model." if is_renamed else "backbone.")
    for file in files:
        file.entries = {_hub_name(found, name): entry for name, entry in file.entries.items()}
    return found


def _take_others(
    files: list[SafetensorsFile], stored: set[str]
) -> dict[str, tuple[SafetensorsFile, TensorEntry]]:
    """Take from the files what belongs to the model around the text model."""
    has_prefix = any(name.startswith(OUTER) for name in stored)
    of_text = (OUTER,) if has_prefix else _TEXT_PARTS
    others = {}
    for file in files:
        for name in [name for name in file.entries if not name.startswith(of_text)]:
            others[name] = (file, file.entries.pop(name))
    return others


def _hub_name(files: HubFiles, name: str) -> str:
    name = name.removeprefix(files.prefix)
    if files.trunk == "model." and name.startswith("model."):
        return "backbone." + name.removeprefix("model.")
    return name


def _shards(index: Path) -> dict[str, str]:
    """The file of each tensor, all within the index's directory."""
    hint = "download it again"
    owner = read_object(index, hint).get("weight_map")
    if not isinstance(owner, dict):
        raise ValueError(
            f"{index}: not an index of safetensors files (weight_map={shown(owner)}); {hint}"
        )
    for file in set(map(str, owner.values())) if owner else ():
        if not _is_inside(file):
            raise ValueError(
                f"{index}: weight_map names the file {shown(file)}, and only .safetensors files "
                f"within {index.parent} are opened; {hint}"
            )
    return {name: str(file) for name, file in owner.items()}


def _is_inside(name: str) -> bool:
    """Whether a name stays below the directory that it is joined to, as written."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    anchored = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    return not anchored and ".." not in parts and "\0" not in name and name.endswith(".safetensors")
