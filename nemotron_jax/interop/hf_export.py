"""Writing a model as a hub directory that transformers and `load_pretrained` both read."""

import collections
import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.dtypes import dtype_name
from nemotron_jax.config.hub import text_config, with_text_config
from nemotron_jax.config.hub_writer import to_hf
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.untrusted import read_object
from nemotron_jax.data import companions
from nemotron_jax.interop.hf_encode import Encoder, Quantization, module_of
from nemotron_jax.interop.hf_import import default_dtype
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.hf_recipe import FILE as RECIPE_FILE
from nemotron_jax.interop.hf_recipe import KEY as RECIPE_KEY
from nemotron_jax.interop.hub_files import INDEX_FILE, SINGLE_FILE, HubFiles, open_hub
from nemotron_jax.interop.parts import readable
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.types import Origin

SHARD_BYTES = 5_000_000_000


def save_hub(
    model: Nemotron,
    path: str | os.PathLike,
    dtype: str | None = None,
    *,
    quantization: Quantization | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write `model` under the hub's names into the directory `path`; how many matrices are stored
    as codes, by format.

    `dtype=None` gives each tensor the dtype of the files it was loaded from (for a new model
    bfloat16, selection biases float32); `quantization` stores matrices as codes instead. The new
    directory is written whole beside `path` and then takes its place; files of an older directory
    that a model does not consist of are kept. Processes that share a model all call it, and the
    first one writes; none returns before the directory is there. Raises ValueError for a dtype that
    no model is stored in, for a path that cannot be written, and as `Encoder` does.
    """
    dtype = None if dtype is None else dtype_name("save_pretrained", dtype)
    processes = jax.process_count()
    rule = f"codes are made by one process, and there are {processes}; save floats"
    check_value(
        "save_pretrained",
        "quantization",
        quantization,
        quantization is None or processes == 1,
        rule,
    )
    target = Path(path).resolve()
    encoder = None if quantization is None else Encoder(model, quantization)
    origin = model.origin if model.origin is not None else Origin("", "bfloat16")
    around = _model_around(origin)
    stored = origin.dtype if dtype is None else dtype
    exceptions = dict(origin.dtype_exceptions) if dtype is None else {}
    if encoder is None:
        tensors = _stored(model, stored, exceptions, around)
    else:
        tensors = _encoded(encoder, stored, exceptions, around)
    if jax.process_index() > 0:
        collections.deque(tensors, maxlen=0)  # all take part where the first reads a parameter
        multihost_utils.sync_global_devices("save_pretrained")
        return {}
    staging = _staging(target)
    try:
        _write_tensors(tensors, staging, shard_bytes)
        _write_companions(model, staging, origin)
        config = _hub_config(model.config, stored, around)
        if encoder is not None:
            config |= _write_recipe(encoder, staging)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in staging.glob("*.safetensors"):  # written for their owner alone
            shutil.copymode(staging / "config.json", file)
        staging.chmod(_with_search((staging / "config.json").stat().st_mode))
        _take_place(staging, target)
        if processes > 1:
            multihost_utils.sync_global_devices("save_pretrained")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {} if encoder is None else encoder.counts()


@dataclasses.dataclass(frozen=True)
class _Around:
    """The directory of a model of text and images, of whose text model a new version is written."""

    keys: dict[str, Any]  # of its config.json
    files: HubFiles


def _model_around(origin: Origin) -> _Around | None:
    """What the files of the origin hold around the text model; None where that is all."""
    config = Path(origin.hub) / "config.json"
    if not origin.is_part:
        return None
    keys = read_object(config, "save_pretrained needs the model that this is a part of")
    return _Around(keys, open_hub(config.parent, keys))


def _hub_config(config: ModelConfig, stored: str, around: _Around | None) -> dict[str, Any]:
    """The config.json of a model stored in a dtype, within that of the model around it."""
    # Transformers before 4.56 reads `torch_dtype` alone, and would load float32 without it.
    names = {"torch_dtype": stored, "dtype": stored}
    if around is None:
        return {**to_hf(config), **names}
    text = dict(text_config(around.keys))
    if ModelConfig.from_hf(around.keys) != config:
        text = to_hf(config)

    def renamed(keys: dict[str, Any]) -> dict[str, Any]:
        """With the dtype that is written, and without a recipe of codes: floats are written."""
        keys = {**keys, **{key: names[key] for key in names if key in keys}}
        return {key: value for key, value in keys.items() if key != RECIPE_KEY}

    return renamed(with_text_config(around.keys, renamed(text)))


def _staging(target: Path) -> Path:
    """A new folder beside `target`, where that may become a directory."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"save_pretrained: {target} is a file; name a directory")
    if Path.cwd().is_relative_to(target):  # an empty path means it too
        raise ValueError(
            f"save_pretrained: {target} holds the working directory and would be replaced as a "
            "whole; name a new directory"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}-writing-", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"save_pretrained: {target} cannot be written ({error}); name a directory that can"
        ) from None


def _with_search(mode: int) -> int:
    """A directory's mode for a file's: whoever may read it may look inside."""
    return (mode | (mode & 0o444) >> 2 | 0o700) & 0o777


def _take_place(staging: Path, target: Path) -> None:
    """Put `staging` where `target` is, with the files of `target` that it lacks; all or nothing."""
    if not target.exists():
        os.rename(staging, target)
        return
    for kept in target.iterdir():
        # The recipe of a quantised checkpoint says how to read its weights.
        is_weights = kept.suffix == ".safetensors" or kept.name in (INDEX_FILE, RECIPE_FILE)
        if not is_weights and not (staging / kept.name).exists():
            (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, staging / kept.name)
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    try:
        os.rename(target, retired / target.name)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(retired / target.name, target)
            raise
    finally:
        shutil.rmtree(retired)


def _stored(
    model: Nemotron, stored: str, exceptions: dict[str, str], around: _Around | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as the files have it, those of the model around it unchanged."""
    arrays = {name: readable(leaf) for name, leaf in flatten(model).items()}
    for tensor in hub_tensors(model.config, set(arrays)):
        dtype = _dtype(tensor.name, stored, exceptions)
        yield _stored_name(tensor, around), _cast(tensor.to_hub(arrays), dtype)
    yield from _others(around)


def _encoded(
    encoder: Encoder, stored: str, exceptions: dict[str, str], around: _Around | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as the files have it, matrices of the recipe as codes with scales."""
    for tensor in encoder.tensors:
        name = _stored_name(tensor, around)
        if name.endswith(".weight") and module_of(tensor) in encoder.formats:
            yield from encoder.codes(tensor, name)
        else:
            yield name, _cast(encoder.floats(tensor), _dtype(tensor.name, stored, exceptions))
    yield from _others(around)


def _dtype(name: str, stored: str, exceptions: dict[str, str]) -> np.dtype:
    kind = exceptions.get(name)
    return default_dtype(name, stored) if kind is None else default_dtype("", kind)


def _stored_name(tensor: HubTensor, around: _Around | None) -> str:
    return tensor.name if around is None else around.files.stored_name(tensor.name)


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(array.astype(dtype))


def _others(around: _Around | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, (file, entry) in around.files.others.items() if around else ():
        yield name, file.read_entry(entry)


def _write_recipe(encoder: Encoder, directory: Path) -> dict[str, Any]:
    """Write the recipe's own file; its key of config.json, which transformers and vLLM read."""
    recipe, producer = encoder.recipe(), {"name": "nemotron_jax"}
    own = {"producer": producer, "quantization": recipe}
    (directory / RECIPE_FILE).write_text(json.dumps(own, indent=2) + "\n")
    return {RECIPE_KEY: {"quant_method": "modelopt", "producer": producer, **recipe}}


def _write_tensors(
    tensors: Iterable[tuple[str, np.ndarray]], directory: Path, shard_bytes: int
) -> None:
    shards, shard, size, places = 0, {}, 0, {}

    def flush() -> None:
        nonlocal shards, shard, size
        shards += 1
        name = f"model-{shards:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    total = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            flush()
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    _name_shards(directory, shards, places, total)


def _name_shards(directory: Path, shards: int, places: dict[str, str], total: int) -> None:
    if shards == 1:
        os.replace(directory / "model-00001.safetensors", directory / SINGLE_FILE)
        return
    final = lambda name: name.replace(".safetensors", f"-of-{shards:05d}.safetensors")
    for name in set(places.values()):
        os.replace(directory / name, directory / final(name))
    weight_map = {tensor: final(name) for tensor, name in places.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_companions(model: Nemotron, directory: Path, origin: Origin) -> None:
    if origin.hub and not Path(origin.hub).is_dir():
        warnings.warn(
            f"save_pretrained: {origin.hub} is gone, so no chat template or tokenizer goes along",
            stacklevel=4,
        )
    # A run's checkpoint has the tokenizer, its folder `hub` the rest.
    sources = dict.fromkeys(name for name in (origin.directory, origin.hub) if name)
    for source in filter(Path.is_dir, map(Path, sources)):
        companions.copy(source, directory)
    if origin.is_part:
        for file in Path(origin.hub).iterdir():
            if file.suffix == ".py" or file.name.endswith("processor_config.json"):
                shutil.copyfile(file, directory / file.name)
    companions.write_generation(directory, model.config, origin.stop_tokens)
