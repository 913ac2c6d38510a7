"""Models and tokenizers by path: hub directories and directories of runs."""

import dataclasses
import os
import warnings
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from nemotron_jax.config.checks import check_value, local_path
from nemotron_jax.config.dtypes import dtype_name
from nemotron_jax.config.lora import REFUSED_BY_PEFT, LoRAConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import DataConfig, RunConfig
from nemotron_jax.data import companions
from nemotron_jax.data.corpus import TRAIN_TOKENIZER
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.interop.hf_export import save_hub
from nemotron_jax.interop.hf_import import MTP, load_hub
from nemotron_jax.model.adapters import abstract_adapted, has_adapters
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.packing import FORMATS
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.run_directory import TOKENIZER, RunDirectory
from nemotron_jax.sharding import current_mesh
from nemotron_jax.training.checkpoint import load_parameters
from nemotron_jax.training.prepared import Prepared, place_state
from nemotron_jax.training.state import TrainState
from nemotron_jax.types import Origin


def load_pretrained(
    path: str | os.PathLike,
    dtype: str | None = "float32",
    *,
    mtp: str = "keep",
    mesh: Mesh | None = None,
    experts: str = "dense",
) -> Nemotron:
    """The model of a hub directory, or of a run's directory as of its newest whole checkpoint, or
    of one checkpoint, `RUN/checkpoints/step_…`.

    A run that trains adapters gives the model with them.

    `dtype` is that of the matrices (None: as stored); what the family computes in float32 stays
    float32. `mtp="drop"` leaves the MTP block out, which directories saved by transformers lack.
    `mesh` lays the parameters out on its devices as the step does; each host reads its own parts.
    `experts="nvfp4"` keeps the codes and scales of routed experts that are stored so, for decoding
    on one device; otherwise matrices of a quantised directory are dequantised.
    Raises ValueError when the directory holds neither, or a file of it is damaged.
    """
    check_value("load_pretrained", "mtp", mtp, mtp in MTP, f"must be one of {', '.join(MTP)}")
    rule = f"must be one of {', '.join(FORMATS)}"
    check_value("load_pretrained", "experts", experts, experts in FORMATS, rule)
    rule = "NVFP4 codes are not shared over a mesh yet; leave one of the two out"
    check_value("load_pretrained", "experts", experts, experts == "dense" or mesh is None, rule)
    dtype = None if dtype is None else dtype_name("load_pretrained", dtype)
    local_path("load_pretrained", "path", path)
    run = RunDirectory.of_model(path, "load_pretrained")
    if run is not None:
        rule = "a run stores floats; load it, and for_decoding(model, experts='nvfp4') rounds them"
        check_value("load_pretrained", "experts", experts, experts == "dense", rule)
        return _load_run(run, dtype, mesh, drop_mtp=mtp == "drop")
    return load_hub(Path(path), dtype, mtp=mtp, mesh=mesh, experts=experts)


def begin_run(run: Prepared, start: str | None = None) -> TrainState:
    """A run's first state: random parameters, or those of `start`, its `init_from` by default.

    Raises ValueError when that directory holds another model than the run's. Warns of adapters that
    other libraries will not load.
    """
    config, start = run.config, run.config.init_from if start is None else start
    _warn_of_targets(config.lora, config.model)
    if not start:
        return place_state(run)
    model = load_pretrained(start, mesh=current_mesh())
    if model.config != config.model:
        names = [field.name for field in dataclasses.fields(config.model)]
        wrong = [n for n in names if getattr(model.config, n) != getattr(config.model, n)]
        raise ValueError(
            f"RunConfig.init_from={start!r}: its model differs from the run's in "
            f"{', '.join(wrong)}; give the run the same model"
        )
    model.origin = None  # the run's own files say where it comes from
    return place_state(run, model)


def _warn_of_targets(lora: LoRAConfig | None, model: ModelConfig) -> None:
    chosen = lora.chosen(model) if lora else ()
    if refused := [target for target in chosen if target in REFUSED_BY_PEFT]:
        warnings.warn(
            f"RunConfig.lora.targets: PEFT loads no adapter with {', '.join(refused)} onto this "
            "family; train without it, or merge the adapters afterwards",
            stacklevel=2,
        )


def data_of(config: RunConfig, directory: RunDirectory) -> DataConfig:
    """The run's data, with the tokenizer of `init_from` where it would train one of its own.

    Parameters mean nothing under another tokenizer. One that the run already has stays.
    """
    train = config.data.tokenizer.startswith(TRAIN_TOKENIZER)
    if not config.init_from or not train or directory.tokenizer.exists():
        return config.data
    if not Path(config.init_from).is_dir():
        raise ValueError(
            f"RunConfig.init_from={config.init_from!r}: is not a directory; name a run's or a hub "
            "model's"
        )
    if not RunDirectory(config.init_from).tokenizer.exists():
        raise ValueError(
            f"RunConfig.init_from={config.init_from!r} holds no {TOKENIZER}; name the one that its "
            "model was trained with in data.tokenizer"
        )
    return dataclasses.replace(config.data, tokenizer=config.init_from)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a hub directory, a run's directory or a tokenizer.json."""
    local_path("load_tokenizer", "path", path)
    return Tokenizer.load(path)


def save_pretrained(model: Nemotron, path: str | os.PathLike, dtype: str | None = None) -> None:
    """Write `model` as a hub directory; `dtype=None` keeps each tensor's original dtype.

    Raises ValueError when it has adapters, for which the hub's layout has no place, and when the
    directory is a run's.
    """
    local_path("save_pretrained", "path", path)
    if RunDirectory(path).checkpoints.is_dir():
        raise ValueError(
            f"save_pretrained: {path} is a run's directory, whose config.json would be lost; name "
            "another"
        )
    if model.experts_format != "dense":
        raise ValueError(
            "save_pretrained: the model's experts are NVFP4 codes, and floats are written; save "
            "unpacked(model)"
        )
    if has_adapters(model):
        raise ValueError(
            "save_pretrained: the model has adapters; write merge_adapters(model), or the adapters "
            "alone with save_adapter"
        )
    if dtype is None and (model.origin is None or model.origin.is_run):
        warnings.warn(
            "save_pretrained: writes bfloat16, as the family is published, rounding the float32 "
            "matrices; pass dtype='float32' to keep every bit, or dtype='bfloat16'",
            stacklevel=2,
        )
    save_hub(model, path, dtype)


def _load_run(
    directory: RunDirectory, dtype: str | None, mesh: Mesh | None, *, drop_mtp: bool
) -> Nemotron:
    run, step, parameters = load_parameters(directory, mesh=mesh)
    config = run.model
    if drop_mtp:
        config = dataclasses.replace(config, mtp=None)
    model = abstract_adapted(config, run.lora, dtype or "float32")  # runs store float32
    dtypes = {name: leaf.dtype for name, leaf in flatten(model).items()}
    loaded = unflatten(
        model, {name: jnp.asarray(parameters[name], dtype) for name, dtype in dtypes.items()}
    )
    stops = companions.stop_tokens(directory.companions, config.vocab_size)
    loaded.origin = Origin(
        str(directory.checkpoint(step).absolute()),
        "bfloat16",
        stop_tokens=stops,
        step=step,
        hub=str(directory.companions) if directory.companions.is_dir() else "",
    )
    return loaded
