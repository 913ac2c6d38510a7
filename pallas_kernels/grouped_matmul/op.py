"""Grouped matrix products of experts: contract, checks, gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import pallas_tpu, reference, xla


def _reference_matmul(lhs, rhs, group_sizes, *, transpose_rhs):
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    return reference.grouped_matmul(lhs, rhs, group_sizes)


def _reference_mlp_gradients(lhs, up, down, group_sizes, dout):
    forward = functools.partial(reference.grouped_mlp, group_sizes=group_sizes)
    return jax.vjp(forward, lhs, up, down)[1](dout)


MATMUL = {
    "reference": dispatch.Implementation(_reference_matmul),
    "xla": dispatch.Implementation(xla.matmul),
    "pallas_tpu": dispatch.Implementation(pallas_tpu.matmul, unsupported=pallas_tpu.unsupported),
}
OUTER = {
    "reference": dispatch.Implementation(reference.grouped_outer),
    "xla": dispatch.Implementation(xla.outer),
    "pallas_tpu": dispatch.Implementation(pallas_tpu.outer, unsupported=pallas_tpu.unsupported),
}
MLP = {
    "reference": dispatch.Implementation(reference.grouped_mlp, _reference_mlp_gradients),
    "xla": dispatch.Implementation(xla.mlp, xla.mlp_gradients),
    "pallas_tpu": dispatch.Implementation(
        pallas_tpu.mlp, pallas_tpu.mlp_gradients, pallas_tpu.unsupported
    ),
}


def grouped_matmul(
    lhs: Float[Array, "rows K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    transpose_rhs: bool = False,
    implementation: str | None = None,
) -> Float[Array, "rows N"]:
    """Each row times the matrix of its group, in lhs's dtype with float32 accumulation.

    Rows are sorted by group: the first group_sizes[0] rows belong to expert 0, and so on. Rows past
    the sum of the sizes give zeros and receive no gradient; a group may be empty, and its matrix
    then has a gradient of exact zeros. `transpose_rhs` multiplies by the transposed matrices of
    rhs [E, N, K]. The gradient of rhs is accumulated in float32 and returned in rhs's dtype;
    `grouped_outer` gives it in float32. Sizes that sum to more than the rows are cut off there.
    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    """
    axes = "E N K" if transpose_rhs else "E K N"
    _check(
        "grouped_matmul",
        lhs=(lhs, "rows K"),
        rhs=(rhs, axes),
        group_sizes=(group_sizes, "E"),
    )
    operands = lhs, rhs, group_sizes
    names = dispatch.choose(
        "grouped_matmul", MATMUL, implementation, *operands, transpose_rhs=transpose_rhs
    )
    return _matmul(names, transpose_rhs, *operands)


def grouped_outer(
    lhs: Float[Array, "rows K"],
    dout: Float[Array, "rows N"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "E K N"]:
    """Sum over each group's rows of lhsᵀ dout, in float32: the weight gradient of `grouped_matmul`.

    Exact zeros for an empty group; rows past the sum of the sizes do not count. It has no
    derivative of its own.
    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    """
    _check(
        "grouped_outer",
        lhs=(lhs, "rows K"),
        dout=(dout, "rows N"),
        group_sizes=(group_sizes, "E"),
    )
    names = dispatch.choose("grouped_outer", OUTER, implementation, lhs, dout, group_sizes)
    return dispatch.run(OUTER, names, "forward", lhs, dout, group_sizes)


def grouped_mlp(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
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
    names = dispatch.choose("grouped_mlp", MLP, implementation, lhs, up, down, group_sizes)
    return _mlp(names, lhs, up, down, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(names: tuple[str, ...], transpose_rhs: bool, lhs, rhs, group_sizes) -> Array:
    return dispatch.run(
        MATMUL, names, "forward", lhs, rhs, group_sizes, transpose_rhs=transpose_rhs
    )


def _matmul_forward(names: tuple[str, ...], transpose_rhs: bool, *operands: Any) -> Any:
    return _matmul(names, transpose_rhs, *operands), operands


def _matmul_backward(names: tuple[str, ...], transpose_rhs: bool, operands: Any, dout) -> Any:
    lhs, rhs, group_sizes = operands
    dlhs = _matmul(names, not transpose_rhs, dout, rhs, group_sizes)
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    drhs = dispatch.run(OUTER, names, "forward", left, right, group_sizes)
    return dlhs, drhs.astype(rhs.dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(names: tuple[str, ...], lhs, up, down, group_sizes) -> Array:
    return dispatch.run(MLP, names, "forward", lhs, up, down, group_sizes)


def _mlp_forward(names: tuple[str, ...], *operands: Any) -> Any:
    return _mlp(names, *operands), operands


def _mlp_backward(names: tuple[str, ...], operands: Any, dout) -> Any:
    _, up, down, _ = operands
    dlhs, dup, ddown = dispatch.run(MLP, names, "backward", *operands, dout)
    return dlhs, dup.astype(up.dtype), ddown.astype(down.dtype), None


_mlp.defvjp(_mlp_forward, _mlp_backward)


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
