"""Accelerators by name: the one table of what a device can do, as its vendor publishes it.

A device is what jax counts as one. A TPU7x chip is two of them, so that each has half of the chip's
figures; every other chip is one.
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Device:
    """Figures of one device: dense bfloat16, no sparsity; bytes and FLOPs a second."""

    kinds: tuple[str, ...]  # how jax's `device_kind` begins
    flops: float
    hbm: float
    memory: float  # bytes
    # One link of a TPU in one direction, from Google's scaling book (the sheets' sums of all links
    # in both directions come out a tenth higher); of a GPU all its NVLinks in one direction.
    link: float
    dimensions: int = 0  # of a TPU's torus; 0 where a switch joins the devices of a host
    ring: int = 0  # the shortest side of a slice whose ends are joined
    per_chip: int = 1  # devices of a chip
    per_host: int = 4  # that share the fast network, where a switch joins them
    nic: float = 0.0  # between hosts, one direction, of each device: 400 Gb/s, A100's 200
    cores: int = 1
    clock_ghz: float = 0.0  # of a TPU's core: a bundle of instructions a cycle

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU: it has no torus to be cut into slices."""
        return self.dimensions == 0


_NIC = 50e9
# Sources: cloud.google.com/tpu/docs, jax-ml.github.io/scaling-book, NVIDIA's data sheets. Of two
# kinds that begin alike the longer name stands first.
DEVICES = {
    "v4": Device(("TPU v4",), 275e12, 1.228e12, 32e9, 45e9, 3, 4, cores=2, clock_ghz=1.05),
    "v5e": Device(("TPU v5 lite", "TPU v5e"), 197e12, 0.819e12, 16e9, 45e9, 2, 16, clock_ghz=1.5),
    "v5p": Device(("TPU v5",), 459e12, 2.765e12, 95e9, 90e9, 3, 4, cores=2, clock_ghz=1.75),
    "v6e": Device(("TPU v6",), 918e12, 1.64e12, 32e9, 90e9, 2, 16, clock_ghz=1.75),
    "tpu7x": Device(("TPU7",), 1153e12, 3.69e12, 96e9, 45e9, 3, 4, per_chip=2, clock_ghz=2.2),
    "a100": Device(("NVIDIA A100",), 312e12, 2.039e12, 80e9, 300e9, per_host=8, nic=25e9),
    "h100pcie": Device(("NVIDIA H100 PCIe",), 756e12, 2.0e12, 80e9, 64e9, per_host=8, nic=_NIC),
    "h100": Device(("NVIDIA H100",), 989e12, 3.35e12, 80e9, 450e9, per_host=8, nic=_NIC),
    "h200": Device(("NVIDIA H200",), 989e12, 4.8e12, 141e9, 450e9, per_host=8, nic=_NIC),
    "b200": Device(("NVIDIA B200",), 2250e12, 8.0e12, 180e9, 900e9, per_host=8, nic=_NIC),
    "gb200": Device(("NVIDIA GB200",), 2500e12, 8.0e12, 186e9, 900e9, per_host=72, nic=_NIC),
}
# The smallest topology that has whole hosts, for programs of one device.
SMALLEST = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
_MOST_DEVICES = 1 << 20  # far above any slice, so that a slip of the keyboard is found


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices of one kind: a TPU by the sides of its topology in chips, GPUs by their number."""

    target: str
    name: str
    sides: tuple[int, ...]

    @property
    def device(self) -> Device:
        """What one device of the slice is."""
        return DEVICES[self.name]

    @property
    def size(self) -> int:
        """Devices of the slice."""
        return math.prod(self.sides) * self.device.per_chip


def slice_of(target: str) -> Slice:
    """The slice that a target such as `v5p:8x8x4` or `h100:8` names; ValueError where none."""
    name, _, shape = target.partition(":")
    if name not in DEVICES or not re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6}){0,5}", shape, re.A):
        raise ValueError(
            f"target={target!r}: must be a TPU with the sides of its topology, such as v5p:8x8x4, "
            f"or a number of GPUs, such as h100:8; known are {', '.join(DEVICES)}"
        )
    found = Slice(target, name, tuple(int(side) for side in shape.split("x")))
    wanted = found.device.dimensions or 1
    if len(found.sides) != wanted:
        example = "8" if found.device.is_gpu else SMALLEST.get(name, "2x2x1")
        raise ValueError(f"target={target!r}: {name} has {wanted} sides, as in {name}:{example}")
    if found.size > _MOST_DEVICES:
        raise ValueError(f"target={target!r}: has {found.size:,} devices; no slice is that large")
    return found


def of_kind(kind: str) -> Device | None:
    """The device that jax calls `kind`; None where its figures are not known."""
    begins = [
        (len(start), device)
        for device in DEVICES.values()
        for start in device.kinds
        if kind.startswith(start)
    ]
    return max(begins, key=lambda pair: pair[0])[1] if begins else None
