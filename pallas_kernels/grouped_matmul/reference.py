"""The definition of grouped products: every expert takes every row, and a mask picks its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def _membership(group_sizes: Int[Array, "E"], rows: int) -> Float[Array, "E rows"]:
    """1 where a row belongs to a group: rows past the sum of the sizes belong to none."""
    ends = jnp.cumsum(group_sizes)[:, None]
    row = jnp.arange(rows)[None]
    return ((row >= ends - group_sizes[:, None]) & (row < ends)).astype(jnp.float32)


def grouped_matmul(
    lhs: Float[Array, "rows K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"] | None = None,
) -> Float[Array, "rows N"]:
    """Each row of lhs times its group's matrix and scale; zeros past the last group."""
    member = _membership(group_sizes, lhs.shape[0])
    member = member if scale is None else member * scale[:, None]
    wide = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    return jnp.einsum("er,rk,ekn->rn", member, *wide, precision="highest").astype(lhs.dtype)


def grouped_outer(
    lhs: Float[Array, "rows K"],
    dout: Float[Array, "rows N"],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"] | None = None,
) -> Float[Array, "E K N"]:
    """Each group's lhsᵀ dout in float32, times its scale; zeros for an empty group."""
    member = _membership(group_sizes, lhs.shape[0])
    member = member if scale is None else member * scale[:, None]
    wide = lhs.astype(jnp.float32), dout.astype(jnp.float32)
    return jnp.einsum("er,rk,rn->ekn", member, *wide, precision="highest")


def dequantized(
    codes: UInt8[Array, "E K N"], scales: Float[Array, "E K/16 N"]
) -> Float[Array, "E K N"]:
    """The numbers of NVFP4's codes times their blocks' scales."""
    magnitude = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[codes % 8]
    scale = jnp.repeat(scales.astype(jnp.float32), 16, axis=1)
    return jnp.where(codes >= 8, -magnitude, magnitude) * scale


def grouped_mlp(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "rows L"]:
    """Each row through its group's relu²-MLP; zeros past the last group."""
    member = _membership(group_sizes, lhs.shape[0])
    wide = [a.astype(jnp.float32) for a in (lhs, up, down)]
    hidden = jnp.einsum("rl,elf->erf", *wide[:2], precision="highest")
    hidden = jnp.square(jax.nn.relu(hidden))
    out = jnp.einsum("er,erf,efl->rl", member, hidden, wide[2], precision="highest")
    return out.astype(lhs.dtype)
