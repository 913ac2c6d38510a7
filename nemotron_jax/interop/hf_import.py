"""Loading a hub directory (config.json and safetensors files) into a model."""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.dtypes import DTYPES, dtype_name
from nemotron_jax.config.hub import text_config, with_text_config
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.untrusted import read_object, shown
from nemotron_jax.data import companions
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.hf_quantised import Codes, take_codes
from nemotron_jax.interop.hf_recipe import FILE as RECIPE_FILE
from nemotron_jax.interop.hf_recipe import NVFP4, read_recipe
from nemotron_jax.interop.hub_files import open_hub
from nemotron_jax.interop.parts import Destination
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model import accounting
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.packing import pack_experts
from nemotron_jax.model.parameters import abstract_model, flatten, model_shardings, unflatten
from nemotron_jax.types import Origin

_HINT = "download it again, or name the directory of a hub model"
_LISTED = 20  # names shown of a long list of faults
_EMBEDDING = "backbone.embeddings.weight"
MTP = ("keep", "drop")


def load_hub(
    path: str | os.PathLike,
    dtype: str | None = "float32",
    *,
    mtp: str = "keep",
    mesh: Mesh | None = None,
    experts: str = "dense",
    split: bool = False,
) -> Nemotron:
    """The model of a hub directory, its matrices in `dtype` (None: as stored).

    `mtp="drop"` leaves the MTP block out. Tensors are read one at a time, file by file, into the
    memory that a CPU device keeps; with a mesh those that this host's devices hold a part of, and
    of each their parts are kept. `split` gives single layers, for decoding: then they are read
    parameter by parameter, each of which goes to its devices before the next one is begun. Matrices
    stored as codes become the floats that they stand for, one at a time; with `experts="nvfp4"`
    routed experts stay codes. Missing, extra and misshapen tensors are one ValueError that lists
    them all.
    """
    check_value("load_pretrained", "mtp", mtp, mtp in MTP, f"must be one of {', '.join(MTP)}")
    directory = Path(path)
    keys = read_object(directory / "config.json", _HINT)
    recipe = read_recipe(directory, keys)
    config = _model_config(directory, keys, mtp)
    files = open_hub(directory, keys).files
    if mtp == "drop":
        _drop_mtp(files)
    stored = _stored_dtype(directory, keys, files)
    _refuse_other_size(directory, config, files)
    model = abstract_model(
        config, stored if dtype is None else dtype_name("load_pretrained", dtype)
    )
    model = jax.eval_shape(lambda model: model.split_layers(), model) if split else model
    shapes = {name: leaf.shape for name, leaf in flatten(model).items()}
    tensors = {tensor.name: tensor for tensor in hub_tensors(config, set(shapes))}
    codes = {} if recipe is None else take_codes(recipe, files, tensors, shapes)
    _check(directory, tensors, shapes, files, codes)
    if experts == "nvfp4":
        model = _with_codes(directory, model, codes, tensors)

    placed = {} if mesh is None else model_shardings(model, mesh)
    into = {
        name: Destination(leaf.shape, leaf.dtype, placed.get(name))
        for name, leaf in flatten(model).items()
    }
    readers = _readers(files, codes, into, tensors)
    if split:
        place = {name.removesuffix(".words"): number for number, name in enumerate(into)}
        readers = sorted(readers, key=lambda reader: place[tensors[reader[0]].parameters[0]])
    parameters = _filled(readers, codes, into, tensors, shapes)
    loaded = unflatten(model, parameters)
    home = str(directory.resolve())
    loaded.origin = Origin(
        home,
        stored,
        _dtype_exceptions(files, stored),
        companions.stop_tokens(directory, config.vocab_size, _eos(keys)),
        hub=home,
        is_part=text_config(keys) is not keys,
    )
    return loaded


def holds_expert_codes(path: str | os.PathLike) -> bool:
    """Whether a hub directory stores all routed experts of its trunk as NVFP4 codes."""
    directory = Path(path)
    keys = read_object(directory / "config.json", _HINT)
    found = [
        entry.dtype == np.uint8
        for file in open_hub(directory, keys).files
        for name, entry in file.entries.items()
        if ".mixer.experts." in name and name.endswith((".weight", ".weight_packed"))
        if not name.startswith("mtp.")
    ]
    return bool(found) and all(found) and read_recipe(directory, keys) is not None


def _filled(
    readers: Iterable[tuple[str, Callable[[], np.ndarray]]],
    codes: dict[str, Codes],
    into: dict[str, Destination],
    tensors: dict[str, HubTensor],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, jax.Array]:
    """Every parameter by name, each handed to its devices once the last of its tensors is read."""
    missing = Counter(name for tensor in tensors.values() for name in tensor.parameters)
    names, parameters = list(into), {}
    for name, read in readers:
        tensor = tensors[name]
        if tensor.parameters[0] not in into:
            if into[f"{tensor.parameters[0]}.words"].holds(tensor.index):
                _write_codes(into, tensor, codes[name])
            continue
        if any(into[parameter].holds(tensor.index) for parameter in tensor.parameters):
            for parameter, values in tensor.from_hub(read(), shapes):
                into[parameter].write(tensor.index, values)
        missing.subtract(tensor.parameters)
        for parameter in tensor.parameters:
            if not missing[parameter]:
                parameters[parameter] = into.pop(parameter).array()
    return {
        name: parameters[name] if name in parameters else into.pop(name).array() for name in names
    }


def _readers(
    files: list[SafetensorsFile],
    codes: dict[str, Codes],
    into: dict[str, Destination],
    tensors: dict[str, HubTensor],
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Every tensor of the model with what reads it, file by file."""
    for file in files:
        for name in file.entries:
            yield name, functools.partial(file.read_finite, name)
    for name, matrix in codes.items():
        parameter = into.get(tensors[name].parameters[0])
        yield name, functools.partial(matrix.read, parameter and parameter.dtype)


def _with_codes(
    directory: Path, model: Nemotron, codes: dict[str, Codes], tensors: dict[str, HubTensor]
) -> Nemotron:
    """Shapes of the model whose experts stay codes, those of the MTP block where they are some.

    Raises ValueError where an expert of the trunk is stored in another way.
    """
    experts = [name for name, tensor in tensors.items() if ".mixer.experts." in name]
    as_codes = {name for name in experts if name in codes and codes[name].kind == NVFP4}
    for name in experts:
        if not name.startswith("mtp.") and name not in as_codes:
            raise ValueError(
                f"load_pretrained: experts='nvfp4' keeps codes as they are stored, and {directory} "
                f"stores {name} in another way; load it without, and for_decoding(model, "
                "experts='nvfp4') rounds it"
            )
    mtp = [name in as_codes for name in experts if name.startswith("mtp.")]
    return jax.eval_shape(lambda model: pack_experts(model, mtp=all(mtp)), model)


def _write_codes(into: dict[str, Destination], tensor: HubTensor, codes: Codes) -> None:
    """The parts of a matrix of experts, in the order of `PackedExperts`."""
    (matrix,) = tensor.parameters
    held = into[f"{matrix}.words"]
    words, scales, factor = codes.packed(held.shape[-1])
    held.write(tensor.index, words)
    into[f"{matrix}.scales"].write(tensor.index, scales)
    into[f"{matrix}.factor"].write(tensor.index, factor)


def _dtype_exceptions(files: list[SafetensorsFile], stored: str) -> tuple[tuple[str, str], ...]:
    """The tensors that are stored as floats of another dtype than the model's."""
    entries = [(name, entry.dtype) for file in files for name, entry in file.entries.items()]
    return tuple(sorted((name, d.name) for name, d in entries if d != default_dtype(name, stored)))


def default_dtype(name: str, stored: str) -> np.dtype:
    """How a hub checkpoint of dtype `stored` keeps a tensor: as that, but selection biases as
    float32."""
    if name.endswith("e_score_correction_bias"):
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16) if stored == "bfloat16" else np.dtype(stored)


def _eos(keys: dict[str, Any]) -> object:
    return text_config(keys).get("eos_token_id", keys.get("eos_token_id"))


def _stored_dtype(directory: Path, keys: dict, files: list[SafetensorsFile]) -> str:
    """The dtype that config.json names, or that of the embeddings where it leaves it to the files.

    Raises ValueError for one that no model is stored in.
    """
    text = text_config(keys)
    names = [part.get(key) for part in (text, keys) for key in ("dtype", "torch_dtype")]
    owner = str(directory / "config.json")
    named = [dtype_name(owner, name) for name in names if name and name != "auto"]
    if named:
        return named[0]
    found = [file.entries[_EMBEDDING].dtype.name for file in files if _EMBEDDING in file.entries]
    return found[0] if found and found[0] in DTYPES else "bfloat16"


def _model_config(directory: Path, keys: dict[str, Any], mtp: str) -> ModelConfig:
    text = text_config(keys)
    if mtp == "drop":
        text = {**text, "num_nextn_predict_layers": 0}
    try:
        return ModelConfig.from_hf(with_text_config(keys, text))
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None


def _drop_mtp(files: list[SafetensorsFile]) -> None:
    for file in files:
        file.entries = {n: e for n, e in file.entries.items() if not n.startswith("mtp.")}


def _refuse_other_size(directory: Path, config: ModelConfig, files: list[SafetensorsFile]) -> None:
    """Raise ValueError where config.json describes far more than the files hold: so much that
    listing what is missing would take all memory."""
    described = sum(accounting.hub_tensor_counts(config)), accounting.parameters(config).total
    entries = [entry for file in files for entry in file.entries.values()]
    held = len(entries), sum(math.prod(entry.shape) for entry in entries)
    if described[0] > 10 * held[0] + 100_000 or described[1] > 100 * held[1] + 10**9:
        raise ValueError(
            f"{directory}: config.json describes {described[0]} tensors of {described[1]} "
            f"parameters, and its files hold {held[0]} of {held[1]}; compare config.json with the "
            "files"
        )


def _check(
    directory: Path,
    tensors: dict[str, HubTensor],
    shapes: dict[str, tuple[int, ...]],
    files: list[SafetensorsFile],
    codes: dict[str, Codes],
) -> None:
    for file in files:
        for name, entry in file.entries.items():
            if entry.dtype.name not in (*DTYPES, "float64"):
                raise ValueError(
                    f"{file.path}: tensor {shown(name)} is stored as {entry.dtype.name}, codes "
                    f"that mean nothing without scales and a recipe ({RECIPE_FILE}); download the "
                    "directory again, or load the model's bfloat16 checkpoint"
                )
    found = {name: entry.shape for file in files for name, entry in file.entries.items()}
    found |= {name: matrix.shape for name, matrix in codes.items()}
    faults = [
        f"missing {name} {tensors[name].shape(shapes)}" for name in tensors if name not in found
    ]
    unknown = [name for name in found if name not in tensors]
    faults += [f"unknown {shown(name)[1:-1]} {found[name]}" for name in unknown]
    for name in tensors.keys() & found.keys():
        expected = tensors[name].shape(shapes)
        if found[name] != expected:
            faults.append(f"misshapen {name}: {found[name]}, expected {expected}")
    if not faults:
        return
    more = f"\n  … and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    hint = "compare config.json with the files"
    if not tensors.keys() & found.keys():
        prefixes = sorted({shown(name)[1:-1].split(".")[0] + "." for name in found})
        prefixes = ", ".join(prefixes[:5])
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
