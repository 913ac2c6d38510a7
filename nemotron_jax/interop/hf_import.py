"""Loading a hub directory (config.json and safetensors files) into a model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.dtypes import DTYPES, dtype_name
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.parts import Destination
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import abstract_model, flatten, model_shardings, unflatten
from nemotron_jax.types import Origin

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LISTED = 20  # names shown of a long list of faults
_EMBEDDING = "backbone.embeddings.weight"
MTP = ("keep", "drop")


def load_hub(
    path: str | os.PathLike,
    dtype: str | None = "float32",
    *,
    mtp: str = "keep",
    mesh: Mesh | None = None,
) -> Nemotron:
    """The model of a hub directory, its matrices in `dtype` (None: as stored).

    `mtp="drop"` leaves the MTP block out. Tensors are read one at a time, file by file, into the
    memory that a CPU device keeps; with a mesh those that this host's devices hold a part of, and
    of each their parts are kept. Missing, extra and misshapen tensors are one ValueError that
    lists them all.
    """
    check_value("load_pretrained", "mtp", mtp, mtp in MTP, f"must be one of {', '.join(MTP)}")
    directory = Path(path)
    keys = read_json(directory / "config.json")
    _refuse_quantised(directory, keys)
    if mtp == "drop" and isinstance(keys, dict):
        keys = {**keys, "num_nextn_predict_layers": 0}
    config = ModelConfig.from_hf(keys if isinstance(keys, dict) else directory)
    files = _open_files(directory, drop_mtp=mtp == "drop")
    stored = _stored_dtype(directory, keys, files)
    model = abstract_model(
        config, stored if dtype is None else dtype_name("load_pretrained", dtype)
    )
    shapes = {name: leaf.shape for name, leaf in flatten(model).items()}
    tensors = {tensor.name: tensor for tensor in hub_tensors(config, set(shapes))}
    _check(directory, tensors, shapes, files)

    placed = {} if mesh is None else model_shardings(model, mesh)
    into = {
        name: Destination(leaf.shape, leaf.dtype, placed.get(name))
        for name, leaf in flatten(model).items()
    }
    exceptions = []
    for file in files:
        for name, entry in file.entries.items():
            tensor = tensors[name]
            if any(into[parameter].holds(tensor.index) for parameter in tensor.parameters):
                for parameter, values in tensor.from_hub(file.read(name), shapes):
                    into[parameter].write(tensor.index, values)
            if entry.dtype != default_dtype(name, stored):
                exceptions.append((name, entry.dtype.name))
    parameters = {name: into.pop(name).array() for name in shapes}
    loaded = unflatten(model, parameters)
    loaded.origin = Origin(
        str(directory.resolve()), stored, tuple(sorted(exceptions)), read_stop_tokens(directory)
    )
    return loaded


def read_json(file: Path) -> Any:
    """What a JSON file of a directory holds; raises ValueError, naming it, where it is broken."""
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; pass the directory of a hub model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); download it again") from None


def default_dtype(name: str, stored: str) -> np.dtype:
    """How a hub checkpoint of dtype `stored` keeps a tensor: as that, but selection biases as
    float32."""
    if name.endswith("e_score_correction_bias"):
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16) if stored == "bfloat16" else np.dtype(stored)


def read_stop_tokens(directory: Path) -> tuple[int, ...]:
    """The end-of-sequence ids of generation_config.json, or else of config.json; empty without
    any."""
    file = directory / "generation_config.json"
    if not file.is_file():
        file = directory / "config.json"
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object; download it again")
    eos = values.get("eos_token_id")
    tokens = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"{file}: eos_token_id={eos!r} must be a token id or a list of them")
    return tuple(tokens)


def _stored_dtype(directory: Path, keys: dict, files: list[SafetensorsFile]) -> str:
    """The dtype that config.json names, or that of the embeddings where it leaves it to the files.

    Raises ValueError for one that no model is stored in.
    """
    named = keys.get("dtype") or keys.get("torch_dtype") or "auto"
    if named != "auto":
        return dtype_name(str(directory / "config.json"), named)
    found = [file.entries[_EMBEDDING].dtype.name for file in files if _EMBEDDING in file.entries]
    return found[0] if found and found[0] in DTYPES else "bfloat16"


def _refuse_quantised(directory: Path, keys: Any) -> None:
    """Raise ValueError for a quantised checkpoint: its codes mean nothing without their scales."""
    recipe = keys.get("quantization_config") if isinstance(keys, dict) else None
    file = directory / "config.json"
    if recipe is None:
        file = directory / "hf_quant_config.json"
        if not file.is_file():
            return
        recipe = read_json(file)
    recipe = recipe.get("quantization", recipe) if isinstance(recipe, dict) else {}
    name = recipe.get("quant_algo") or recipe.get("quant_method") or "an unknown format"
    raise ValueError(
        f"{directory} is quantised ({name}, {file.name}): its matrices are codes with scales, "
        "which are not read yet; load the model's bfloat16 checkpoint"
    )


def _open_files(directory: Path, *, drop_mtp: bool) -> list[SafetensorsFile]:
    """The directory's files, their tensors under the names of the hub's own checkpoints."""
    index = directory / INDEX_FILE
    owner = _shards(index) if index.is_file() else {}
    names = sorted(set(owner.values())) or [SINGLE_FILE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory}: files are missing: {', '.join(missing)}; download them again"
        )
    files = [SafetensorsFile(directory / name) for name in names]
    for file in files:  # a copy of a tensor in a shard that the index does not name is stale
        for tensor in [
            name for name in file.entries if owner.get(name, file.path.name) != file.path.name
        ]:
            del file.entries[tensor]
    rename = _renaming({name for file in files for name in file.entries})
    for file in files:
        entries = {rename(name): entry for name, entry in file.entries.items()}
        kept = {n: e for n, e in entries.items() if not (drop_mtp and n.startswith("mtp."))}
        file.entries = kept
    return files


def _renaming(names: set[str]) -> Callable[[str], str]:
    """From the names of a checkpoint to the hub's: a language model inside another, or saved by
    transformers under its own names."""
    outer = "language_model."
    outer = outer if not any(n.startswith("backbone.") for n in names) else ""
    inner = {name.removeprefix(outer) for name in names}
    is_renamed = any(n.startswith("model.") for n in inner) and not any(
        n.startswith("backbone.") for n in inner
    )

    def rename(name: str) -> str:
        name = name.removeprefix(outer)
        if is_renamed and name.startswith("model."):
            return "backbone." + name.removeprefix("model.")
        return name

    return rename


def _shards(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        return {
            name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: not an index of safetensors files ({error!r}); download it again"
        ) from error


def _check(
    directory: Path,
    tensors: dict[str, HubTensor],
    shapes: dict[str, tuple[int, ...]],
    files: list[SafetensorsFile],
) -> None:
    for file in files:
        for name, entry in file.entries.items():
            if entry.dtype.name not in (*DTYPES, "float64"):
                raise ValueError(
                    f"{file.path}: tensor {name} is stored as {entry.dtype.name}, codes that mean "
                    "nothing without their scales; load the model's bfloat16 checkpoint"
                )
    found = {name: entry.shape for file in files for name, entry in file.entries.items()}
    faults = [
        f"missing {name} {tensors[name].shape(shapes)}" for name in tensors if name not in found
    ]
    faults += [f"unknown {name} {shape}" for name, shape in found.items() if name not in tensors]
    for name in tensors.keys() & found.keys():
        expected = tensors[name].shape(shapes)
        if found[name] != expected:
            faults.append(f"misshapen {name}: {found[name]}, expected {expected}")
    if not faults:
        return
    more = f"\n  … and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    hint = "compare config.json with the files"
    if not tensors.keys() & found.keys():
        prefixes = ", ".join(sorted({name.split(".")[0] + "." for name in found})[:5])
        hint = f"all names begin with backbone., mtp. or lm_head. and not with {prefixes}"
    if all(fault.startswith("missing mtp.") for fault in faults):
        hint = (
            "transformers saves no MTP block: to load the model without it pass mtp='drop', or "
            "set num_nextn_predict_layers to 0 in config.json"
        )
    lines = "".join(f"\n  {fault}" for fault in sorted(faults)[:_LISTED])
    raise ValueError(
        f"{directory}: {len(faults)} tensors do not fit its config; {hint}:{lines}{more}"
    )
