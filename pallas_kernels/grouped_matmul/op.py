"""Grouped matrix products of experts: contract, checks, gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import pallas_tpu, reference, xla


def _reference_matmul(lhs, rhs, group_sizes, scale, *, transpose_rhs):
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    return reference.grouped_matmul(lhs, rhs, group_sizes, scale)


def _gradients(matmul: Callable[..., Array], outer: Callable[..., Array]) -> Callable[..., Any]:
    """The gradient of a grouped product, by two more of them; none of the scale's."""

    def backward(operands: Any, dout: Array, *, transpose_rhs: bool) -> tuple[Array | None, ...]:
        lhs, rhs, group_sizes, scale = operands
        dlhs = matmul(dout, rhs, group_sizes, scale, transpose_rhs=not transpose_rhs)
        left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
        drhs = outer(left, right, group_sizes, scale).astype(rhs.dtype)
        return dlhs, drhs, None, None if scale is None else jnp.zeros_like(scale)

    return backward


def _reference_mlp_gradients(lhs, up, down, group_sizes, dout):
    mlp = lambda lhs, up, down: reference.grouped_mlp(lhs, up, down, group_sizes)
    return jax.vjp(mlp, lhs, up.astype(jnp.float32), down.astype(jnp.float32))[1](dout)


def mlp_gradients(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass of the op from a function that gives gradients of rows and matrices."""

    def backward(operands: Any, dout: Array) -> tuple[Array | None, ...]:
        _, up, down, _ = operands
        dlhs, dup, ddown = gradients(*operands, dout)
        return dlhs, dup.astype(up.dtype), ddown.astype(down.dtype), None

    return backward


# Operands: (lhs, rhs, group_sizes, scale), where scale is None or a number for each expert.
MATMUL = dispatch.Op(
    "grouped_matmul",
    {
        name: dispatch.Implementation(
            dispatch.keeping_operands(matmul), _gradients(matmul, outer), *limits
        )
        for name, matmul, outer, *limits in (
            ("reference", _reference_matmul, reference.grouped_outer),
            ("xla", xla.matmul, xla.outer),
            ("pallas_tpu", pallas_tpu.matmul, pallas_tpu.outer, pallas_tpu.unsupported, ("tpu",)),
        )
    },
)
# Operands: (lhs, dout, group_sizes, scale).
OUTER = dispatch.Op(
    "grouped_outer",
    {
        name: dispatch.Implementation(dispatch.keeping_operands(outer), None, *limits)
        for name, outer, *limits in (
            ("reference", reference.grouped_outer),
            ("xla", xla.outer),
            ("pallas_tpu", pallas_tpu.outer, pallas_tpu.unsupported, ("tpu",)),
        )
    },
)
# Operands: (lhs, up, down, group_sizes).
MLP = dispatch.Op(
    "grouped_mlp",
    {
        "reference": dispatch.Implementation(*dispatch.autodiff(reference.grouped_mlp)),
        "xla": dispatch.Implementation(
            dispatch.keeping_operands(xla.mlp), mlp_gradients(xla.mlp_gradients)
        ),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(pallas_tpu.mlp),
            mlp_gradients(pallas_tpu.mlp_gradients),
            pallas_tpu.unsupported,
            ("tpu",),
        ),
    },
)
# Operands: (lhs, up, down, group_sizes, dout).
MLP_GRADIENTS = dispatch.Op(
    "grouped_mlp_gradients",
    {
        name: dispatch.Implementation(dispatch.keeping_operands(gradients), None, *limits)
        for name, gradients, *limits in (
            ("reference", _reference_mlp_gradients),
            ("xla", xla.mlp_gradients),
            ("pallas_tpu", pallas_tpu.mlp_gradients, pallas_tpu.unsupported, ("tpu",)),
        )
    },
)


def grouped_matmul(
    lhs: Float[Array, "rows K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    transpose_rhs: bool = False,
    scale: Float[Array, "E"] | None = None,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "rows N"]:
    """Each row times the matrix of its group, in lhs's dtype with float32 accumulation.

    Rows are sorted by group: the first group_sizes[0] rows belong to expert 0, and so on. Rows past
    the sum of the sizes give zeros and receive no gradient; a group may be empty, and its matrix
    then has a gradient of exact zeros. `transpose_rhs` multiplies by the transposed matrices of
    rhs [E, N, K]. The gradient of rhs is accumulated in float32 and returned in rhs's dtype;
    `grouped_outer` gives it in float32. Sizes that sum to more than the rows are cut off there.
    `scale` multiplies each expert's products in float32, before the only rounding; it is a constant
    and gets no gradient. `target` is the platform that the program is compiled for, if known.
    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    """
    axes = "E N K" if transpose_rhs else "E K N"
    _check(
        "grouped_matmul",
        lhs=(lhs, "rows K"),
        rhs=(rhs, axes),
        group_sizes=(group_sizes, "E"),
        **_scales(scale),
    )
    return MATMUL(
        *(lhs, rhs, group_sizes, _constant(scale)),
        transpose_rhs=transpose_rhs,
        implementation=implementation,
        target=target,
    )


def grouped_outer(
    lhs: Float[Array, "rows K"],
    dout: Float[Array, "rows N"],
    group_sizes: Int[Array, "E"],
    *,
    scale: Float[Array, "E"] | None = None,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "E K N"]:
    """Sum over each group's rows of lhsᵀ dout, in float32: the weight gradient of `grouped_matmul`.

    `scale` multiplies each expert's sum. Exact zeros for an empty group; rows past the sum of the
    sizes do not count. It has no derivative of its own.
    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    """
    _check(
        "grouped_outer",
        lhs=(lhs, "rows K"),
        dout=(dout, "rows N"),
        group_sizes=(group_sizes, "E"),
        **_scales(scale),
    )
    return OUTER(
        *(lhs, dout, group_sizes, _constant(scale)), implementation=implementation, target=target
    )


def grouped_mlp(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "rows L"]:
    """Each row through its group's MLP, down(relu(up(row))²), in lhs's dtype.

    Equals two `grouped_matmul`s with the activation rounded to lhs's dtype, but keeps no hidden for
    the backward pass, which computes it again. Rows and gradients follow `grouped_matmul`.
    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    """
    _check(
        "grouped_mlp",
        lhs=(lhs, "rows L"),
        up=(up, "E L F"),
        down=(down, "E F L"),
        group_sizes=(group_sizes, "E"),
    )
    return MLP(lhs, up, down, group_sizes, implementation=implementation, target=target)


def grouped_mlp_gradients(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    dout: Float[Array, "rows L"],
    *,
    implementation: str | None = None,
    target: str | None = None,
) -> tuple[Float[Array, "rows L"], Float[Array, "E L F"], Float[Array, "E F L"]]:
    """Gradients of `grouped_mlp` in lhs, up and down, given that of its result; the latter two in
    float32, whatever the matrices' dtype is.

    It has no derivative of its own. Raises ValueError for shapes that disagree and for an
    implementation that cannot run.
    """
    _check(
        "grouped_mlp_gradients",
        lhs=(lhs, "rows L"),
        up=(up, "E L F"),
        down=(down, "E F L"),
        group_sizes=(group_sizes, "E"),
        dout=(dout, "rows L"),
    )
    operands = lhs, up, down, group_sizes, dout
    return MLP_GRADIENTS(*operands, implementation=implementation, target=target)


def _scales(scale: Array | None) -> dict[str, tuple[Array, str]]:
    return {} if scale is None else {"scale": (scale, "E")}


def _constant(scale: Array | None) -> Array | None:
    return None if scale is None else lax.stop_gradient(scale.astype(jnp.float32))


def _check(op: str, **arrays: Any) -> None:
    """Shapes agree, there is a row and an expert, and sizes are integers."""
    sizes: dict[str, int] = {}
    dispatch.expect_shape(op, sizes, **arrays)
    for letter, size in sizes.items():
        if not size:
            raise ValueError(f"{op}: {letter}=0; every axis needs at least one element")
    dtype = arrays["group_sizes"][0].dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{op}: group_sizes has dtype {dtype}; it must be an integer type")
