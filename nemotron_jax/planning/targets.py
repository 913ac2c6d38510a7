"""Targets that a program is compiled for: their devices, and what it takes there.

Nothing here imports jax before it is called: how many CPU devices it shows is decided first.
"""

import math
import os
import re
from typing import TYPE_CHECKING, Any

from nemotron_jax.config.run import RunConfig

if TYPE_CHECKING:
    import jax

# The host makes each device before anything is compiled: thousands take minutes and gigabytes.
MOST_CPU_DEVICES = 1024


def devices_of(target: str) -> tuple:
    """Devices of a target, and the bytes that each may use."""
    import jax

    from pallas_kernels import absent

    if (count := cpu_device_count(target)) is None:
        return absent.tpu_devices(target), absent.memory_of(target)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"target={target!r}: this process shows {len(devices)} CPU devices; start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return devices[:count], memory / count


def cpu_device_count(target: str) -> int | None:
    """How many devices a target of a CPU has; None for another target."""
    name, _, count = target.partition(":")
    if name != "cpu":
        return None
    if not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= MOST_CPU_DEVICES:
        raise ValueError(
            f"target={target!r}: of a CPU, say how many devices, from cpu:1 to "
            f"cpu:{MOST_CPU_DEVICES}, such as cpu:8"
        )
    return int(count)


def check_count(config: RunConfig, target: str, count: int) -> None:
    """Raise ValueError where a target has another number of devices than the mesh."""
    if config.mesh.size == count:
        return
    data = config.mesh.data
    fsdp = count // data if count % data == 0 else count
    data = count // fsdp
    raise ValueError(
        f"target={target!r} has {count} devices, but the mesh of {config.mesh.named} is "
        f"{config.mesh.size}; such as --config.mesh.data={data} "
        f"--config.mesh.fsdp={fsdp} would use them all"
    )


def memory_of_program(program: "jax.stages.Compiled", target: str) -> tuple[int, int]:
    """Bytes that one device needs beside what it is given and gives back, and in all."""
    analysis = program.memory_analysis()
    given = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    if target.startswith("cpu:"):
        temporaries = analysis.temp_size_in_bytes
    else:
        # Of a TPU's program that size holds the buffers of a loop inside a loop twice: its step was
        # said not to fit where the compiler, which sees its real buffers, had placed them all.
        temporaries = analysis.peak_memory_in_bytes - given
    return temporaries, given + temporaries + analysis.generated_code_size_in_bytes


def part_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
