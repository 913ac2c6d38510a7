"""Whether a run can go on this machine at all, said before its data is read."""

import dataclasses
import os
from pathlib import Path

import jax

from nemotron_jax.config.execution import KERNEL_OPS
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.precision import PrecisionConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.accounting import parameters
from nemotron_jax.model.beside import model_beside
from nemotron_jax.model.parameters import abstract_model

# Which devices a kernel's name asks for, as jax calls their platforms.
_PLATFORMS = {"pallas_tpu": ("tpu",), "pallas_gpu": ("gpu", "cuda", "rocm")}
# A container's limit, where there is one: the machine may have more than the run is given.
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_kernels(config: RunConfig) -> None:
    """Raise ValueError where a run names a kernel that does not exist or is for other devices."""
    execution, platform = config.execution, jax.devices()[0].platform
    for op in KERNEL_OPS:
        name = execution.kernel(op)
        wanted = _PLATFORMS.get(name, (platform,))
        if platform not in wanted:
            raise ValueError(
                f"Execution.kernels={execution.kernels!r}: {op}={name} needs a "
                f"{wanted[0].upper()}, and this machine has {jax.device_count()} "
                f"{platform.upper()} devices; set execution.kernels=auto"
            )
    if any(execution.kernel(op) != "auto" for op in KERNEL_OPS):
        data, mesh = config.data, config.mesh
        rows = data.batch_size // config.training.micro_batches // mesh.row_shards
        tokens = jax.ShapeDtypeStruct((rows, data.sequence_length), "int32")
        plain = dataclasses.replace(execution, precision=PrecisionConfig())
        run = lambda model, tokens: model(tokens, execution=plain).hidden
        jax.eval_shape(run, abstract_model(config.model), tokens)


def check_memory(config: RunConfig) -> None:
    """Raise ValueError where the least that a step needs is more than there is.

    The least are parameters with moments and gradient, those of a teacher or reference, and the
    hidden state of each token that is kept before every layer. A step that passes may still need
    more.
    """
    devices, mesh = jax.devices(), config.mesh
    on_cpu = devices[0].platform == "cpu"
    # A CPU's devices share one memory.
    shards, sharing = (
        (mesh.fsdp * mesh.expert * mesh.tensor, 1) if not on_cpu else (1, mesh.row_shards)
    )
    words = 4 if config.training.trains == "all" else 1  # weight, two moments, gradient
    weights = int(words * _weight_bytes(config.lora) * parameters(config.model).total)
    beside = model_beside(config)
    weights = (weights + (beside.bytes if beside else 0)) // shards
    rows = config.data.batch_size // config.training.micro_batches // mesh.row_shards * sharing
    layers, width = config.model.num_layers, config.model.width
    half = 2 if config.execution.compute_dtype == "bfloat16" else 4
    hidden = rows * config.data.sequence_length * width * layers * half
    limit = _host_memory() if on_cpu else (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None or weights + hidden <= limit:
        return
    told = f"at least {(weights + hidden) / 1e9:,.0f} GB, and {limit / 1e9:,.0f} GB are there"
    if weights > limit:
        raise ValueError(
            f"RunConfig.model: its weights, moments and gradient{_named(config)} take {told}; "
            "train a smaller model, or share it by mesh.fsdp or mesh.expert among more devices"
        )
    raise ValueError(
        f"RunConfig.data.batch_size={config.data.batch_size}: a step of rows of "
        f"{config.data.sequence_length} tokens takes {told}; lower data.batch_size or "
        "data.sequence_length, or raise training.micro_batches"
    )


def _named(config: RunConfig) -> str:
    """How an error names the weights of a model beside the run's own."""
    names = {"distill": " with its teacher", "grpo": " with its reference"}
    return names[config.stage] if model_beside(config) else ""


def _weight_bytes(lora: LoRAConfig | None) -> float:
    """Bytes of one weight, at least: with codes nearly all are routed experts', 4.5 bits each."""
    if lora is None:
        return 4
    return 0.5625 if lora.base_experts == "nvfp4" else 2 if lora.base_dtype == "bfloat16" else 4


def _host_memory() -> int:
    """Bytes of this machine, or of the container that the process is in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no limit, or another system
        return physical
