"""A parameter filled from a file piece by piece: the parts of it that this host's devices hold."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

_ALIGNMENT = 64  # bytes; a CPU device takes memory that begins at such a multiple without a copy


@dataclasses.dataclass(frozen=True)
class Part:
    """One block of a parameter, in memory of its own."""

    starts: tuple[int, ...]
    values: np.ndarray

    def holds(self, index: tuple[int, ...]) -> bool:
        """Whether any of the block lies at this place along the first axes."""
        places = zip(index, self.starts, self.values.shape)
        return all(start <= place < start + size for place, start, size in places)

    def write(self, index: tuple[int, ...], values: np.ndarray) -> None:
        """Copy what the block has of `values`, which stand at `index` of the parameter."""
        lead = len(index)
        within = tuple(place - start for place, start in zip(index, self.starts))
        blocks = zip(self.starts[lead:], self.values.shape[lead:])
        self.values[within] = values[tuple(slice(start, start + size) for start, size in blocks)]


class Destination:
    """A parameter of a shape, dtype and placement, whose values come one after another.

    Devices that hold the same block share its memory until it is theirs. Without a placement the
    block is the whole and goes to the default device.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> None:
        self._shape, self.dtype, self._sharding = shape, dtype, sharding
        self._parts: dict[tuple, Part] = {}
        self._owners: list[tuple[jax.Device | None, tuple]] = []
        places = {None: (slice(None),) * len(shape)}
        if sharding is not None:
            places = sharding.addressable_devices_indices_map(shape)
        for device, slices in places.items():
            ranges = tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))
            self._owners.append((device, ranges))
            if ranges not in self._parts:
                sizes = tuple(stop - start for start, stop in ranges)
                starts = tuple(start for start, _ in ranges)
                self._parts[ranges] = Part(starts, _allocate(sizes, dtype))

    def holds(self, index: tuple[int, ...]) -> bool:
        """Whether a device of this host has any of the parameter at this place."""
        return any(part.holds(index) for part in self._parts.values())

    def write(self, index: tuple[int, ...], values: np.ndarray) -> None:
        """Values of the parameter at `index` of its first axes, cast to its dtype."""
        for part in self._parts.values():
            if part.holds(index):
                part.write(index, values)

    def array(self) -> jax.Array:
        """The filled parameter; call it once, for a CPU device keeps the memory."""
        if self._sharding is None:
            return jax.device_put(self._parts[self._owners[0][1]].values, may_alias=True)
        placed = [
            jax.device_put(self._parts[ranges].values, device, may_alias=True)
            for device, ranges in self._owners
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, placed)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at an aligned address."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
