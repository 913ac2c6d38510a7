"""Models and tokenizers by path: hub directories and directories of runs."""

import dataclasses
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemotron_jax.config.checks import check_value, local_path
from nemotron_jax.config.dtypes import EXPERTS, dtype_name
from nemotron_jax.config.lora import REFUSED_BY_PEFT, LoRAConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import DataConfig, MeshConfig
from nemotron_jax.data import companions
from nemotron_jax.data.corpus import TRAIN_TOKENIZER
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.interop.hf_encode import Quantization
from nemotron_jax.interop.hf_export import save_hub
from nemotron_jax.interop.hf_import import MTP, holds_expert_codes, load_hub
from nemotron_jax.model.adapters import (
    abstract_adapted,
    as_base,
    has_adapters,
    merge_adapters,
    without_adapters,
)
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.packing import pack_experts, unpacked
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.run_base import keep_base, read_base
from nemotron_jax.run_directory import TOKENIZER, RunDirectory
from nemotron_jax.sharding import current_mesh, make_mesh, on_mesh
from nemotron_jax.training.checkpoint import load_parameters
from nemotron_jax.training.prepared import Prepared, place_state, random_model
from nemotron_jax.training.state import TrainState
from nemotron_jax.types import Origin

LAYOUTS = ("decoding", "training")  # how the parameters lie on a mesh


def load_pretrained(
    path: str | os.PathLike,
    dtype: str | None = "float32",
    *,
    mtp: str = "keep",
    mesh: Mesh | MeshConfig | None = None,
    experts: str = "dense",
    layout: str = "decoding",
) -> Nemotron:
    """The model of a hub directory, or of a run's directory as of its newest whole checkpoint, or
    of one checkpoint, `RUN/checkpoints/step_…`.

    A run that trains adapters gives the model with them.

    `dtype` is that of the matrices (None: as stored); what the family computes in float32 stays
    float32. `mtp="drop"` leaves the MTP block out, which directories saved by transformers lack.
    `mesh` lays the parameters out on its devices, as decoding wants them: single layers, whose
    weights stay where they are, and of which a host holds little more than one matrix at a time;
    `layout="training"` as a step does. Each host reads its own parts.
    `experts="nvfp4"` keeps the codes and scales of routed experts that are stored so, for decoding
    or as the base of adapters; otherwise matrices of a quantised directory are dequantised. Of a
    run that trains adapters beside codes it keeps these.
    Raises ValueError when the directory holds neither, or a file of it is damaged.
    """
    check_value("load_pretrained", "mtp", mtp, mtp in MTP, f"must be one of {', '.join(MTP)}")
    rule = f"must be one of {', '.join(EXPERTS)}"
    check_value("load_pretrained", "experts", experts, experts in EXPERTS, rule)
    check_value(
        "load_pretrained",
        "layout",
        layout,
        layout in LAYOUTS,
        f"must be one of {', '.join(LAYOUTS)}",
    )
    if isinstance(mesh, MeshConfig):
        mesh = make_mesh(mesh, jax.devices())
    split = mesh is not None and layout == "decoding"
    dtype = None if dtype is None else dtype_name("load_pretrained", dtype)
    local_path("load_pretrained", "path", path)
    run = RunDirectory.of_model(path, "load_pretrained")
    if run is not None:
        drop = mtp == "drop"
        return _load_run(run, dtype, mesh, drop_mtp=drop, split=split, experts=experts)
    return load_hub(Path(path), dtype, mtp=mtp, mesh=mesh, experts=experts, split=split)


def load_rounded(
    path: str | os.PathLike,
    dtype: str | None = "float32",
    *,
    mtp: str = "keep",
    mesh: Mesh | MeshConfig | None = None,
    experts: str = "dense",
    layout: str = "decoding",
) -> Nemotron:
    """`load_pretrained`; with `experts="nvfp4"` routed experts that are stored as floats are
    rounded to codes, once they are in `dtype`."""
    stored = experts if experts != "nvfp4" or _holds_codes(path) else "dense"
    model = load_pretrained(path, dtype, mtp=mtp, mesh=mesh, experts=stored, layout=layout)
    return pack_experts(model) if experts == "nvfp4" else model


def _holds_codes(path: str | os.PathLike) -> bool:
    """Whether routed experts are stored as NVFP4 codes: a hub model's, or a run's frozen base."""
    run = RunDirectory.of_model(path, "load_pretrained")
    if run is None:
        return holds_expert_codes(path)
    lora = run.read().lora
    return lora is not None and lora.base_experts == "nvfp4"


def begin_run(run: Prepared, start: str | None = None) -> TrainState:
    """A run's first state: random parameters, or those of `start`, its `init_from` by default.

    Where the run trains adapters, those parameters are their base: held as `lora` says, and named
    in the directory's base.json. Raises ValueError when `start` holds another model than the run's,
    or than an earlier session's base. Warns of adapters that other libraries will not load.
    """
    config, start = run.config, run.config.init_from if start is None else start
    _warn_of_targets(config.lora, config.model)
    if not start:
        state = place_state(run)
        keep_base(run, without_adapters(state.model) if config.lora else None, "")
        return state
    model = _start(start, config.lora, current_mesh())
    if model.config != config.model:
        names = [field.name for field in dataclasses.fields(config.model)]
        wrong = [n for n in names if getattr(model.config, n) != getattr(config.model, n)]
        raise ValueError(
            f"RunConfig.init_from={start!r}: its model differs from the run's in "
            f"{', '.join(wrong)}; give the run the same model"
        )
    keep_base(run, model if config.lora else None, model.origin.directory)
    model.origin = None  # the run's own files say where it comes from
    return place_state(run, model)


def _start(start: str, lora: LoRAConfig | None, mesh: Mesh | None) -> Nemotron:
    """The model of a directory that a run begins with; adapters that it has become its own."""
    if lora is None:
        return load_pretrained(start, mesh=mesh, layout="training")
    held = lora.base_experts
    model = load_rounded(start, lora.base_dtype, mesh=mesh, experts=held, layout="training")
    if not has_adapters(model):
        return model
    merged = as_base(merge_adapters(unpacked(model)), lora)
    merged.origin = model.origin
    return merged


def _warn_of_targets(lora: LoRAConfig | None, model: ModelConfig) -> None:
    chosen = lora.chosen(model) if lora else ()
    if refused := [target for target in chosen if target in REFUSED_BY_PEFT]:
        warnings.warn(
            f"RunConfig.lora.targets: PEFT loads no adapter with {', '.join(refused)} onto this "
            "family; train without it, or merge the adapters afterwards",
            stacklevel=2,
        )


def data_of(data: DataConfig, init_from: str, directory: RunDirectory) -> DataConfig:
    """A run's data, with the tokenizer of `init_from` where it would train one of its own.

    Parameters mean nothing under another tokenizer. One that the run already has stays.
    """
    train = data.tokenizer.startswith(TRAIN_TOKENIZER)
    if not init_from or not train or directory.tokenizer.exists():
        return data
    if not Path(init_from).is_dir():
        raise ValueError(
            f"RunConfig.init_from={init_from!r}: is not a directory; name a run's or a hub model's"
        )
    if not RunDirectory(init_from).tokenizer.exists():
        raise ValueError(
            f"RunConfig.init_from={init_from!r} holds no {TOKENIZER}; name the one that its "
            "model was trained with in data.tokenizer"
        )
    return dataclasses.replace(data, tokenizer=init_from)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a hub directory, a run's directory or a tokenizer.json."""
    local_path("load_tokenizer", "path", path)
    return Tokenizer.load(path)


def save_pretrained(
    model: Nemotron,
    path: str | os.PathLike,
    dtype: str | None = None,
    *,
    quantization: str | Quantization | None = None,
) -> dict[str, int]:
    """Write `model` as a hub directory; `dtype=None` keeps each tensor's original dtype.

    `quantization` stores matrices as codes with scales, in Model-Optimizer's layout: `nvfp4`,
    `fp8`, or `released`, the map of the model's own release; all else keeps `dtype`. Experts that
    are codes in the model stay the same codes. Returns how many matrices each format stores.
    Raises ValueError when the model has adapters, for which the hub's layout has no place, when
    its experts are codes and floats are asked for, when its layers are split for decoding, and when
    the directory is a run's.
    """
    local_path("save_pretrained", "path", path)
    if RunDirectory(path).checkpoints.is_dir():
        raise ValueError(
            f"save_pretrained: {path} is a run's directory, whose config.json would be lost; name "
            "another"
        )
    if model.is_split:
        raise ValueError(
            "save_pretrained: the model's layers stand apart, as decoding reads them; save the one "
            "that it was made of, or load it with layout='training'"
        )
    if quantization is None and model.experts_format != "dense":
        raise ValueError(
            "save_pretrained: the model's experts are NVFP4 codes, and floats are written; pass "
            "quantization='nvfp4', or save unpacked(model)"
        )
    if has_adapters(model):
        raise ValueError(
            "save_pretrained: the model has adapters; write merge_adapters(model), or the adapters "
            "alone with save_adapter"
        )
    if isinstance(quantization, str):
        quantization = Quantization(quantization)
    floats = quantization is None
    if floats and dtype is None and (model.origin is None or model.origin.is_run):
        warnings.warn(
            "save_pretrained: writes bfloat16, as the family is published, rounding the float32 "
            "matrices; pass dtype='float32' to keep every bit, or dtype='bfloat16'",
            stacklevel=2,
        )
    return save_hub(model, path, dtype, quantization=quantization)


def _load_run(
    directory: RunDirectory,
    dtype: str | None,
    mesh: Mesh | None,
    *,
    drop_mtp: bool,
    split: bool,
    experts: str,
) -> Nemotron:
    run, step, parameters = load_parameters(directory, mesh=mesh)
    held = "dense" if run.lora is None else run.lora.base_experts
    rule = "this run holds floats; load it, and for_decoding(model, experts='nvfp4') rounds them"
    check_value("load_pretrained", "experts", experts, experts in ("dense", held), rule)
    config = run.model
    if drop_mtp:
        config = dataclasses.replace(config, mtp=None)
    if run.lora is not None:
        load = lambda path: _start(path, run.lora, mesh)
        draw = jax.jit(lambda: random_model(run.model, run.lora, run.seed))
        base = read_base(directory.checkpoint(step), load, draw)
        parameters = flatten(base) | parameters
    model = abstract_adapted(config, run.lora, dtype)  # without adapters runs store float32
    dtypes = {name: leaf.dtype for name, leaf in flatten(model).items()}
    loaded = unflatten(
        model, {name: jnp.asarray(parameters[name], dtype) for name, dtype in dtypes.items()}
    )
    loaded = loaded if experts == held else unpacked(loaded)
    if split:
        with on_mesh(mesh):
            loaded = for_decoding(loaded)
    stops = companions.stop_tokens(directory.companions, config.vocab_size)
    loaded.origin = Origin(
        str(directory.checkpoint(step).absolute()),
        "bfloat16",
        stop_tokens=stops,
        step=step,
        hub=str(directory.companions) if directory.companions.is_dir() else "",
    )
    return loaded
