"""Chooses the implementation of an op from its name or from the platform it is compiled for.

The platform is that of the lowered program (`jax.lax.platform_dependent`), never that of the
machine that traces it: a host with CPUs alone can compile an op for a TPU or a GPU.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

DEFAULT = "xla"  # runs wherever XLA does, so it is what the other platforms get


def no_limits(*_: Any, **__: Any) -> None:
    """The `unsupported` of an implementation that runs everywhere, whatever the shapes."""
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `unsupported` is a pure function of the op's arrays (only shapes and dtypes count) and options:
    a sentence when they cannot run, else None. `platforms` are those on which it is preferred when
    the caller names no implementation: of "cpu", "tpu", "cuda", "rocm".
    `forward` and `backward` share one signature with those of every other implementation of the op,
    residuals included; an op without a backward of its own leaves it None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    unsupported: Callable[..., str | None] = no_limits
    platforms: tuple[str, ...] = ()


Implementations = Mapping[str, Implementation]


def choose(
    op: str, implementations: Implementations, want: str | None, *arrays: Any, **options: Any
) -> tuple[str, ...]:
    """Names that may run: the default first, then those preferred on some platform.

    An implementation asked for by name is the only one, and a reason against it is an error: it
    never falls back. Raises ValueError for an unknown name or an unsupported case.
    """
    if want is None:
        preferred = (name for name, entry in implementations.items() if entry.platforms)
        runnable = (n for n in preferred if not implementations[n].unsupported(*arrays, **options))
        return (DEFAULT, *runnable)
    if want not in implementations:
        known = ", ".join(sorted(implementations))
        raise ValueError(
            f"{op}: implementation={want!r} does not exist; choose one of {known}, "
            "or None for the target platform's own"
        )
    if reason := implementations[want].unsupported(*arrays, **options):
        raise ValueError(f"{op}: implementation={want!r} cannot run here: {reason}")
    return (want,)


def run(
    implementations: Implementations,
    names: tuple[str, ...],
    direction: Literal["forward", "backward"],
    *arrays: Any,
    **options: Any,
) -> Any:
    """What the implementation for the target platform returns; `names` come from `choose`."""

    def branch(name: str) -> Callable[..., Any]:
        function = getattr(implementations[name], direction)
        return lambda *operands: function(*operands, **options)

    default, *preferred = names
    if not preferred:
        return branch(default)(*arrays)
    branches = {p: branch(name) for name in preferred for p in implementations[name].platforms}
    return jax.lax.platform_dependent(*arrays, default=branch(default), **branches)


def expect_shape(op: str, sizes: dict[str, int], **arrays: tuple[Any, str]) -> None:
    """Checks `name=(array, "B T M")` against `sizes`, adding letters that occur for the first time.

    Raises ValueError naming the op, the array, its shape and the axis that disagrees.
    """
    for name, (array, axes) in arrays.items():
        letters = axes.split()
        if array.ndim != len(letters):
            raise ValueError(
                f"{op}: {name} has shape {array.shape}; it must be [{', '.join(letters)}]"
            )
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{op}: {name} has shape {array.shape}, but {letter} of "
                    f"[{', '.join(letters)}] is {sizes[letter]} in the other operands"
                )
