"""Arrays that several processes share, read on a host."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_here(array: jax.Array | np.ndarray) -> bool:
    """Whether this process holds all of an array."""
    is_spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    return not is_spread or array.is_fully_replicated


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array, in every process that has a part of it, which must all ask for it."""
    if is_here(array):
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def parts_on_host(array: jax.Array) -> Iterator[np.ndarray]:
    """All of an array, as `on_host`, in parts that follow one another: one, or where several
    processes share it an entry of its first axis at a time."""
    if is_here(array):
        yield np.asarray(array)
    else:
        yield from (on_host(array[entry]) for entry in range(len(array)))
