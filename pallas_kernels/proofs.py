"""What a folder of kernels gives to be proven: `proofs.py` with a function `proofs()`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Proof:
    """One kernel in one direction at one shape.

    `flops` and `bytes` are what the operation asks for: each operand read and each result written
    once, no padding. `steps` are those of the grid and `branches` how often its parts run (see
    `bundles.cycles`), of all cores together and for typical operands; without steps no cycles are
    told. `plain` is the same operation without the kernel. `given` holds the values of operands, by
    their place, that say how much is to be done; any others do to time it.
    """

    kernel: str  # the name that its pallas_call has
    direction: str
    shape: str
    run: Callable[..., Any]
    operands: Sequence[jax.ShapeDtypeStruct]
    flops: int
    bytes: int
    steps: float = 0
    branches: Sequence[Sequence[float]] = ()
    multiplied_flops: int | None = None  # with padding; None: those asked for
    plain: Callable[..., Any] | None = None
    given: Mapping[int, Any] = dataclasses.field(default_factory=dict)


def nbytes(*arrays: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))
