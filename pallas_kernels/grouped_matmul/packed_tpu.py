"""Grouped products with packed experts on TPU: a visit's matrix is made in fast memory.

Grid and visits are `pallas_tpu`'s. The words of an expert's matrix are fetched once for all tiles
of its group, and the first visit that has rows makes bfloat16 of them, which stays for the next
visits of the same expert. Its rows are in an order of their own: in each 128, those that are first
in their block of 16, then the second, and so on; lhs is put into it before the kernel, and what a
transposed product makes is put back after it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import pallas_tpu, pieces
from pallas_kernels.grouped_matmul.pallas_tpu import Interpret, matrix_block, tile_block
from pallas_kernels.grouped_matmul.visits import by_tile

BLOCK = 16  # rows that share a scale
SUBLANES = 8  # of a vector of 32-bit numbers
DEPTH = BLOCK * SUBLANES  # rows that are made together
# Bits of a float32: where a code's three bits of magnitude come to lie, the exponent under them,
# which makes them 1/8 .. 3/2, and the sign.
MAGNITUDE, EXPONENT, SIGN = 7 << 22, 124 << 23, -(1 << 31)


def matmul(
    lhs: Float[Array, "rows K"],
    words: Float[Array, "E 2 B N"],
    scales: Float[Array, "E B N"],
    factor: Float[Array, "E"],
    group_sizes: Int[Array, "E"],
    *,
    activation: str | None = None,
    interpret: Interpret = False,
) -> Float[Array, "rows N"]:
    """Rows times their expert's matrix, its factor and the activation; zeros past the groups."""
    rows, depth = lhs.shape[0], words.shape[2] * BLOCK
    lhs = jnp.pad(lhs, [(0, 0), (0, depth - lhs.shape[1])])
    lhs = lhs.reshape(rows, -1, SUBLANES, BLOCK).swapaxes(2, 3).reshape(rows, depth)
    experts = words, scales, factor
    return _product(lhs, experts, group_sizes, activation=activation, interpret=interpret)


def matmul_transposed(
    lhs: Float[Array, "rows N"],
    words: Float[Array, "E 2 B N"],
    scales: Float[Array, "E B N"],
    factor: Float[Array, "E"],
    group_sizes: Int[Array, "E"],
    *,
    depth: int,
    interpret: Interpret = False,
) -> Float[Array, "rows K"]:
    """Rows times the transpose of their expert's matrix, and its factor; K is `depth`."""
    experts, rows = (words, scales, factor), lhs.shape[0]
    out = _product(lhs, experts, group_sizes, transpose_rhs=True, interpret=interpret)
    out = out.reshape(rows, -1, BLOCK, SUBLANES).swapaxes(2, 3)
    return out.reshape(rows, -1)[:, :depth]


def _product(
    lhs: Float[Array, "rows _"],
    experts: tuple[Array, Array, Array],
    group_sizes: Int[Array, "E"],
    *,
    transpose_rhs: bool = False,
    activation: str | None = None,
    interpret: Interpret,
) -> Float[Array, "rows _"]:
    """A product with the matrices as they are made, whose rows are in an order of their own."""
    words, scales, factor = experts
    rows, width, depth = lhs.shape[0], words.shape[3], words.shape[2] * BLOCK
    given, made = (width, depth) if transpose_rhs else (depth, width)
    height = tile_rows(rows, lhs.dtype.itemsize, depth, width)
    visits = by_tile(group_sizes, rows, height)
    kernel = functools.partial(
        _kernel, bound=visits.bound, transpose_rhs=transpose_rhs, activation=activation
    )
    call = pallas_tpu.over_visits(
        kernel,
        visits,
        scalars=1,
        inputs=[tile_block(height, given), matrix_block(words.shape), matrix_block(scales.shape)],
        outputs=[tile_block(height, made)],
        shapes=[jax.ShapeDtypeStruct((rows, made), lhs.dtype)],
        scratch=[
            pltpu.VMEM((depth, width), jnp.bfloat16),  # the matrix
            pltpu.VMEM((depth // BLOCK, width), jnp.float32),  # its scales
            pltpu.SMEM((1,), jnp.int32),  # whose it is
        ],
        cost=(2 * rows * depth * width, lhs.nbytes + words.nbytes + scales.nbytes),
        name="grouped_matmul_packed" + "_transposed" * transpose_rhs,
        interpret=interpret,
    )
    return call(*visits.tables(), factor, lhs, words, scales)[0]


def unsupported(lhs: Array, words: Array, *_: Any, **options: Any) -> str | None:
    """Why these operands cannot run, or None: lhs's dtype, or a matrix too small or too large."""
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return f"lhs is {lhs.dtype}; the kernel takes bfloat16 and float32"
    sides = words.shape[2] * BLOCK, words.shape[3]
    if min(sides) < pallas_tpu.NARROWEST:
        return (
            f"an expert's matrix is {sides[0]} x {sides[1]}; "
            f"sides of {pallas_tpu.NARROWEST} are the least"
        )
    needs = _fixed_bytes(*sides) + 2 * pieces.STEP * lhs.dtype.itemsize * sum(sides)
    if needs > pallas_tpu.VMEM_BLOCKS:
        return (
            f"an expert's matrix and its rows need {needs / 2**20:.0f} MiB of fast memory, and "
            f"the kernel keeps it within {pallas_tpu.VMEM_BLOCKS // 2**20}; shard the matrices"
        )
    return None


def _kernel(
    expert_ref, tile_ref, low_ref, high_ref, first_ref,
    factor_ref,  # [E] float32
    lhs_ref,  # [height, K], or [height, N]
    words_ref,  # [2, B, N] float32, as bits
    scales_ref,  # [B, N] float8
    out_ref,  # [height, N], or [height, K]
    matrix_ref,  # [K, N] bfloat16
    floats_ref,  # [B, N] float32
    holds_ref,  # [1] int32
    *, bound, transpose_rhs, activation,
):  # fmt: skip
    """Makes the visit's matrix unless it is there, and multiplies the visit's rows by it."""
    visit = pl.program_id(0) * bound + pl.program_id(1)
    expert = expert_ref[visit]

    @pl.when(pl.program_id(1) == 0)
    def _():
        holds_ref[0] = -1

    @pl.when((high_ref[visit] > low_ref[visit]) & (holds_ref[0] != expert))
    def _():
        holds_ref[0] = expert
        floats_ref[...] = scales_ref[...].astype(jnp.float32)
        make = functools.partial(_make, words_ref, floats_ref, matrix_ref)
        pl.loop(0, matrix_ref.shape[0] // DEPTH)(make)

    tables = expert_ref, low_ref, high_ref, first_ref, factor_ref
    pallas_tpu.multiply_visit(
        *(tables, lhs_ref, matrix_ref, out_ref),
        bound=bound,
        transpose_rhs=transpose_rhs,
        activation=activation,
    )


def _make(words_ref: Any, floats_ref: Any, matrix_ref: Any, i: Array) -> None:
    """Rows 128 i .. 128 i + 127 of a matrix, from eight rows of scales and both their words."""
    rows = pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)

    def columns(column: Any) -> None:
        scale = floats_ref[rows, column]
        for half in range(2):
            words = lax.bitcast_convert_type(words_ref[half, rows, column], jnp.int32)
            for j in range(0, SUBLANES, 2):
                pair = [_numbers(words, scale, j + odd) for odd in range(2)]
                start = i * DEPTH + (half * SUBLANES + j) * SUBLANES
                place = pl.ds(pl.multiple_of(start, BLOCK), BLOCK)
                matrix_ref[place, column] = jnp.concatenate(pair).astype(matrix_ref.dtype)

    pieces.over_columns(matrix_ref.shape[1], columns)


def _numbers(words: Int[Array, "8 n"], scale: Float[Array, "8 n"], j: int) -> Float[Array, "8 n"]:
    """What the words' codes j stand for, times their scales.

    A code's magnitude bits, two of exponent and one of mantissa, are a float's but for the smallest
    exponent, at which E2M1 is 0 and 0.5 where the float is 0.5 and 0.75: twice that less 1/2 is
    right there, and above it is more than the float, or as much.
    """
    shift = 22 - 4 * j
    placed = words << shift if shift >= 0 else lax.shift_right_logical(words, -shift)
    float_bits = (placed & MAGNITUDE) | EXPONENT
    product = lax.bitcast_convert_type(float_bits, jnp.float32) * (4 * scale)
    product = jnp.minimum(product, product + product - scale)
    sign = (words << (28 - 4 * j)) & SIGN
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(product, jnp.int32) ^ sign, jnp.float32
    )


def tile_rows(rows: int, itemsize: int, depth: int, width: int) -> int:
    """A tile's height: half of the rows, if that fits, for decoding has fewer than one tile's and
    a chip may have two cores."""
    half = -(-rows // (2 * pieces.STEP)) * pieces.STEP
    fixed = _fixed_bytes(depth, width) // 2
    return min(half, pallas_tpu.tile_rows(rows, itemsize * (depth + width), fixed))


def _fixed_bytes(depth: int, width: int) -> int:
    """Fast memory that does not depend on rows: two blocks of words, and what is made of one."""
    size = depth * width
    return 2 * (size // 2 + size // BLOCK) + 2 * size + 4 * size // BLOCK
