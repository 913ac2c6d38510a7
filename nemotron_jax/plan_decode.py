"""Compile the engine's decode program for devices that are not here: what a decode step takes."""

import dataclasses
import time

import jax
import numpy as np
from jax.sharding import Mesh

from nemotron_jax import compiled
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.decoding.loop import Sizes
from nemotron_jax.decoding.rules import Asked, Free
from nemotron_jax.decoding.store import DecodeRows, FlatModel, Store, decode
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.packing import pack_experts
from nemotron_jax.model.parameters import abstract_model, abstract_on
from nemotron_jax.planning.targets import check_count, devices_of, memory_of_program, part_bytes
from nemotron_jax.sharding import make_mesh

_DTYPE = "bfloat16"  # of weights, keys and values, as served
_ROUNDS = 8  # tokens of one call


def plan(config: RunConfig, target: str, engine: EngineConfig, experts: str = "dense") -> dict:
    """What one call of the engine's decode program takes on a target, on the config's mesh, all
    slots in use and the routed experts held as `experts` says.

    Bytes are one device's. Collectives are those of a step, with the first tokens of rows whose
    prompts have just been read, which a call decodes once. Raises ValueError as `plan.plan` does.
    """
    devices, memory = devices_of(target)
    check_count(config, target, len(devices))
    mesh = make_mesh(config.mesh, devices)
    begin = time.monotonic()
    program, model, store = compile_decode(config.model, mesh, engine, experts)
    seconds = time.monotonic() - begin
    found = compiled.collectives(program.as_text())
    temporaries, total = memory_of_program(program, target)
    kept = store.pools, store.mtp_pools
    return {
        "target": target,
        "stage": "decode",
        "estimated": False,
        "fits": total <= memory,
        "bytes_per_device": {
            "parameters": part_bytes(model),
            "optimizer": 0,
            "kv": part_bytes(kept),
            "states": part_bytes(store.slots),
            "temporaries": temporaries,
            "total": total,
            "available": int(memory),
        },
        "collectives": compiled.summary(found),
        "overlap": compiled.overlap(found),
        "largest_collective_bytes": max((one.bytes for one in found), default=0),
        "compile_seconds": round(seconds, 1),
        "mesh": dataclasses.asdict(config.mesh),
        "pattern": config.model.pattern,
        "decode": {
            "rows": engine.slots,
            "context": engine.max_length,
            "experts": experts,
            "speculative": {"k": engine.speculative},
        },
        "rows": engine.slots,
        "sequence_length": engine.max_length,
        "micro_batches": 1,
        "remat": "none",
        "precision": _DTYPE,
        "trains": "none",
        "jax": jax.__version__,
        "why": "",
    }


def engine_of(rows: int, context: int, speculative: int = 0) -> EngineConfig:
    """An engine with room for so many rows of `context` tokens, prompt and answer together."""
    return EngineConfig(slots=rows, max_length=context, speculative=speculative, rounds=_ROUNDS)


def compile_decode(
    model: ModelConfig, mesh: Mesh, engine: EngineConfig, experts: str = "dense"
) -> tuple[jax.stages.Compiled, Nemotron, Store]:
    """The engine's program that decodes all slots, and its abstract model and store.

    It is lowered from shapes: nothing is made. Weights are bfloat16, routed experts NVFP4 codes
    where `experts` is "nvfp4".
    """
    tokens = engine.max_length + engine.speculative + 1
    rows = _rows(engine.slots, -(-tokens // engine.page_tokens), model)
    with jax.set_mesh(mesh):
        weights = abstract_for_decoding(model, mesh, experts)
        store = abstract_store(weights, engine)
        sizes = Sizes(engine.capacity(engine.speculative), engine.speculative, 0)
        lowered = decode.lower(
            FlatModel.of(weights),
            store,
            rows,
            jax.ShapeDtypeStruct((), np.int32),
            sizes=sizes,
            execution=Execution(),
        )
        return lowered.compile(), weights, store


def abstract_for_decoding(config: ModelConfig, mesh: Mesh, experts: str = "dense") -> Nemotron:
    """Shapes and placement of a model as decoding has it."""
    held = pack_experts if experts == "nvfp4" else lambda model: model
    made = lambda model: held(model).split_layers()
    return abstract_on(jax.eval_shape(made, abstract_model(config, _DTYPE)), mesh)


def abstract_store(model: Nemotron, engine: EngineConfig) -> Store:
    """Shapes and placement of an engine's memory, on the mesh that is set; without snapshots, of
    which the programs take none."""
    made = lambda model: dataclasses.replace(Store.empty(model, engine), snapshots=None)
    lowered = jax.jit(made).lower(model)
    places = lowered.compile().output_shardings
    shaped = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(shaped, lowered.out_info, places)


def _rows(count: int, width: int, model: ModelConfig) -> DecodeRows:
    empty = np.zeros(count, np.int32)
    flags = np.zeros(count, bool)
    asked = Asked.of({}, count, Free(model.vocab_size))
    told = DecodeRows(empty, np.zeros((count, width), np.int32), empty, empty, flags, flags, asked)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), told)
