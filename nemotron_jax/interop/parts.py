"""A parameter read and filled piece by piece, where this host's devices hold parts of it alone."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from nemotron_jax.sharding.hosts import is_here, on_host

_ALIGNMENT = 64  # bytes; a CPU device takes memory that begins at such a multiple without a copy


@dataclasses.dataclass(frozen=True)
class Part:
    """One block of a parameter, in memory of its own, taken when the first values come."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @functools.cached_property
    def values(self) -> np.ndarray:
        """What was written so far."""
        return _allocate(self.shape, self.dtype)

    def holds(self, index: tuple[int, ...]) -> bool:
        """Whether any of the block lies at this place along the first axes."""
        places = zip(index, self.starts, self.shape)
        return all(start <= place < start + size for place, start, size in places)

    def write(self, index: tuple[int, ...], values: np.ndarray) -> None:
        """Copy what the block has of `values`, which stand at `index` of the parameter."""
        lead = len(index)
        within = tuple(place - start for place, start in zip(index, self.starts))
        blocks = zip(self.starts[lead:], self.shape[lead:])
        self.values[within] = values[tuple(slice(start, start + size) for start, size in blocks)]


class Destination:
    """A parameter of a shape, dtype and placement, whose values come one after another.

    Devices that hold the same block share its memory until it is theirs. Without a placement the
    block is the whole and goes to the default device.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> None:
        self.shape, self.dtype, self._sharding = shape, dtype, sharding
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
                self._parts[ranges] = Part(starts, sizes, dtype)

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
        return jax.make_array_from_single_device_arrays(self.shape, self._sharding, placed)


class Spread:
    """A parameter that several processes share, gathered into each one's memory as it is asked for.

    Of layers that are stacked one is held at a time. All processes ask for the same in turn.
    """

    def __init__(self, leaf: jax.Array) -> None:
        self._leaf, self._layer, self._values = leaf, None, None

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        if self._values is None or index[:1] != self._layer:
            self._layer = index[:1]
            self._values = on_host(self._leaf[self._layer] if index else self._leaf)
        return self._values[index[1:]]


def readable(leaf: jax.Array) -> np.ndarray | Spread:
    """A parameter whose places can be read on this host."""
    return np.asarray(leaf) if is_here(leaf) else Spread(leaf)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at an aligned address."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
