"""Chooses the implementation of an op from its name or from the platform it is compiled for.

The platform is that of the lowered program (`jax.lax.platform_dependent`), never that of the
machine that traces it: a host with CPUs alone can compile an op for a TPU or a GPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
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
    `forward` and `backward` share one signature with those of every other implementation of the op;
    an op without a backward of its own leaves it None. `outputs` returns what `forward` does less
    its residuals, where leaving them out saves work.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    unsupported: Callable[..., str | None] = no_limits
    platforms: tuple[str, ...] = ()
    outputs: Callable[..., Any] | None = None


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


@dataclasses.dataclass(frozen=True, eq=False)  # an op is itself alone: hashable, one trace each
class Op:
    """An op with its implementations: chooses one, runs it, and differentiates it by its own rule.

    Its implementations' `forward(*operands, **options)` returns (out, residuals), and their
    `backward(residuals, cotangent, **options)` the gradients of the operands in order, None for
    integers. Residuals belong to their implementation: no two need agree on what they keep.
    """

    name: str
    implementations: Implementations

    def __call__(
        self,
        *operands: Any,
        implementation: str | None = None,
        target: str | None = None,
        **options: Any,
    ) -> Any:
        """What the chosen implementation returns; options are hashable and enter no gradient.

        `target` is the platform that the program is compiled for, where the caller knows it: then
        one implementation alone is traced. None leaves the choice to the lowering. Raises
        ValueError as `choose` does, and for an unknown platform.
        """
        names = choose(self.name, self.implementations, implementation, *operands, **options)
        if target is not None:
            names = (self._on(target, names),)
        return _differentiable(self, names, tuple(sorted(options.items())), *operands)

    def _on(self, target: str, names: tuple[str, ...]) -> str:
        if target not in PLATFORMS:
            raise ValueError(
                f"{self.name}: target={target!r} must be one of {', '.join(PLATFORMS)}, or None"
            )
        default, *preferred = names
        fitting = [n for n in preferred if target in self.implementations[n].platforms]
        return fitting[-1] if fitting else default  # as `run` gives a platform to the last of two


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(op: Op, names: tuple[str, ...], options: Any, *operands: Any) -> Any:
    def alone(entry: Implementation) -> Callable[..., Any]:
        return entry.outputs or (
            lambda *operands, **options: entry.forward(*operands, **options)[0]
        )

    outputs = {
        name: dataclasses.replace(entry, forward=alone(entry))
        for name, entry in op.implementations.items()
        if name in names
    }
    return run(outputs, names, "forward", *operands, **dict(options))


def _differentiable_forward(op: Op, names: tuple[str, ...], options: Any, *operands: Any) -> Any:
    if len(names) > 1:
        # The program's branches would have to keep the same arrays; keep what all of them were
        # given, and let the one that runs compute its residuals again.
        return _differentiable(op, names, options, *operands), operands
    return op.implementations[names[0]].forward(*operands, **dict(options))


def _differentiable_backward(
    op: Op, names: tuple[str, ...], options: Any, residuals: Any, cotangent: Any
) -> Any:
    if len(names) == 1:
        entry = op.implementations[names[0]]
        return tuple(entry.backward(residuals, cotangent, **dict(options)))
    # Integers have no gradient, and a branch returns arrays: the operands that have one are the
    # same for every implementation.
    variable = [i for i, o in enumerate(residuals) if _differs(o)]

    def again(entry: Implementation) -> Callable[..., Any]:
        def backward(*arrays: Any, **options: Any) -> Any:
            *operands, cotangent = arrays
            kept = entry.forward(*operands, **options)[1]
            gradients = tuple(entry.backward(kept, cotangent, **options))
            return tuple(gradients[i] for i in variable)

        return backward

    table = {
        n: dataclasses.replace(op.implementations[n], backward=again(op.implementations[n]))
        for n in names
    }
    found = run(table, names, "backward", *residuals, cotangent, **dict(options))
    gradients: list[Any] = [None] * len(residuals)
    for index, gradient in zip(variable, found, strict=True):
        gradients[index] = gradient
    return tuple(gradients)


_differentiable.defvjp(_differentiable_forward, _differentiable_backward)


def _differs(operand: Any) -> bool:
    """Whether an operand, a tree of arrays or None, has a gradient."""
    leaves = jax.tree.leaves(operand)
    return bool(leaves) and all(jax.numpy.issubdtype(a.dtype, jax.numpy.floating) for a in leaves)


def keeping_operands(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as the forward of an `Op` whose backward starts from the operands alone."""

    def forward(*operands: Any, **options: Any) -> Any:
        return function(*operands, **options), operands

    return forward


def autodiff(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`function` as the forward of an `Op`, and its own derivative as the backward."""

    def backward(operands: Any, cotangent: Any, **options: Any) -> list[Any]:
        variable = [i for i, o in enumerate(operands) if _differs(o)]

        def of(*variables: Any) -> Any:
            given = list(operands)
            for index, array in zip(variable, variables, strict=True):
                given[index] = array
            return function(*given, **options)

        gradients: list[Any] = [None] * len(operands)
        found = jax.vjp(of, *(operands[i] for i in variable))[1](cotangent)
        for index, gradient in zip(variable, found, strict=True):
            gradients[index] = gradient
        return gradients

    return keeping_operands(function), backward


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
