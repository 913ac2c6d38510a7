"""Devices of machines that are not here, for compiling ahead of time."""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from pallas_kernels.devices import DEVICES, SMALLEST

# Without these libtpu asks a metadata server what machine this is, and complains of the answer; and
# one process alone may load it.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_SIDES = {name: shape.count("x") + 1 for name, shape in SMALLEST.items()}


def tpu_devices(target: str) -> Sequence[jax.Device]:
    """The devices of a TPU such as `v5p:8x8x4`, of which none is here.

    Programs are lowered and compiled for them; nothing can run on them. Raises ValueError for a
    name that is no such topology, and where libtpu, which holds the compiler, is not installed.
    """
    name, _, shape = target.partition(":")
    if name not in SMALLEST or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"target={target!r}: {_rule()}")
    if len(shape.split("x")) != _SIDES[name]:
        raise ValueError(
            f"target={target!r}: {name} has {_SIDES[name]} sides, as in {name}:{SMALLEST[name]}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"target={target!r}: compiling for a TPU needs libtpu, which is not installed; "
            "pip install -e '.[tpu]' in a checkout, or pip install libtpu"
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    sides = [int(side) for side in shape.split("x")]
    host = [2 if side % 2 == 0 else 1 for side in sides[:2]]  # chips of one host along each side
    try:
        topology = topologies.get_topology_desc(target, "tpu", chips_per_host_bounds=[*host, 1])
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"target={target!r}: libtpu knows no such topology: {reason}") from None
    return topology.devices


def memory_of(target: str) -> float:
    """Bytes of high-bandwidth memory of one device of a TPU target."""
    return DEVICES[target.partition(":")[0]].memory


def smallest(name: str) -> str:
    """The smallest topology of a generation of TPUs, such as `v5p:2x2x1`."""
    if name not in SMALLEST:
        raise ValueError(f"target={name!r}: must be one of {', '.join(SMALLEST)}")
    return f"{name}:{SMALLEST[name]}"


def _rule() -> str:
    examples = ", ".join(f"{name}:{shape}" for name, shape in SMALLEST.items())
    return f"must be a TPU with the sides of its topology, such as v5p:8x8x4 or {examples}"
