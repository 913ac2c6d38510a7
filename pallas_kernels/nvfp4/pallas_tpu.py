"""NVFP4 on TPU: a matrix quantised in one pass over it, once its largest magnitude is known.

A step of the grid is a block of 128 x 128 tiles. In a tile the 16 elements that share a scale lie
along the sublanes, so that their maximum is a few additions' work; where they lie along the columns
the tile is turned over, and the result turned back. Random bits are hashed from each element's
place, and the Hadamard transform is a product with the 16 x 16 matrix repeated on a diagonal:
neither takes another pass. Nothing is carried from step to step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.nvfp4 import random, xla

TILE = 128  # rows and columns of a tile: a register's lanes, and what turning over takes
BLOCK = 16  # elements that share a scale
ROWS, COLUMNS = 256, 1024  # of a step's block, at most: large enough to hide the copies' latency

Interpret = bool | pltpu.InterpretParams


def round_trip(
    x: Float[Array, "R C"],
    words: UInt32[Array, "2"] | None,
    rows: Int[Array, "R"] | None,
    amax: Array,
    *,
    block: tuple[int, int],
    hadamard: bool,
    interpret: Interpret = False,
) -> Float[Array, "R C"]:
    """What `xla.round_trip` returns, from a kernel that writes it in bfloat16, which is exact."""
    (height, width), turned = x.shape, block == (1, BLOCK)
    block_rows, block_columns = block_sizes(height, width)
    inputs, specs = operands(x, words, rows, amax, block_rows, block_columns, turned=turned)
    kernel = functools.partial(
        _kernel,
        height=height,
        turned=turned,
        square=block == (BLOCK, BLOCK),
        hadamard=hadamard,
    )
    values = pl.pallas_call(
        kernel,
        grid=(-(-height // block_rows), width // block_columns),
        in_specs=specs,
        out_specs=pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=40 * x.size, bytes_accessed=x.nbytes + 2 * x.size, transcendentals=0
        ),
        name="nvfp4_round_trip",
        interpret=interpret,
    )(*inputs)
    return values.astype(jnp.float32)


def block_sizes(height: int, width: int, step: int = TILE) -> tuple[int, int]:
    """Rows and columns of a block; the columns divide the width and are multiples of `step`."""
    columns = next(n for n in range(COLUMNS, 0, -step) if width % n == 0)
    return min(ROWS, -(-height // TILE) * TILE), columns


def operands(
    x: Float[Array, "R C"],
    words: UInt32[Array, "2"] | None,
    rows: Int[Array, "R"] | None,
    amax: Array,
    *block: int,
    turned: bool,
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """What a kernel reads, and the block of each: x, its scales' factors, what to draw bits by."""
    block_rows, block_columns = block
    by_row = pl.BlockSpec((1, block_rows), lambda i, j: (0, i))
    by_strip = pl.BlockSpec((block_rows // BLOCK, TILE), lambda i, j: (i, 0))
    inputs = [x, *_factors(amax, x.shape[0], block_rows, turned=turned)]
    specs = [pl.BlockSpec(block, lambda i, j: (i, j))] + [by_row if turned else by_strip] * 2
    if words is not None:
        hashed = random.hashed_rows(words, _filled(rows, block_rows, 0))
        inputs += [_signed(words[1:]), _signed(hashed)[None]]
        specs += [pl.BlockSpec(memory_space=pltpu.SMEM), by_row]
    return inputs, specs


def unsupported(x: Array, *_: Any, **options: Any) -> str | None:
    """Why this matrix cannot be quantised, or None: its rows fill registers of 128 lanes."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}; the kernel takes bfloat16 and float32"
    if x.shape[1] % TILE or x.shape[0] % BLOCK:
        return (
            f"x is {x.shape[0]} x {x.shape[1]}; the kernel takes multiples of {BLOCK} rows and of "
            f"{TILE} columns"
        )
    return None


def _kernel(
    x_ref,  # [rows, columns]
    encode_ref,  # [1, rows] float32 where tiles are turned over, else [rows/16, 128]
    decode_ref,  # likewise
    *refs,  # a random word [1], hashed rows [1, rows], both int32, if any; values [rows, columns]
    height,  # of the whole matrix
    turned,
    square,
    hadamard,
):
    *random_refs, values_ref = refs
    block_rows, block_columns = x_ref.shape
    # Asked here, for the loops' bodies cannot.
    above, first = pl.program_id(0) * block_rows, pl.program_id(1) * block_columns
    own_row = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0)
    own_column = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0 if turned else 1)

    def tile(i: Any, j: Any) -> None:
        rows, columns = pl.ds(i * TILE, TILE), pl.ds(pl.multiple_of(j * TILE, TILE), TILE)
        x = x_ref[rows, columns]
        if hadamard:  # the product would spread what lies past the matrix
            inside = own_row < height - (above + i * TILE)
            x = _transformed(jnp.where(inside, x, jnp.zeros_like(x)))
        if turned:
            x = jnp.transpose(x)
        x = x.astype(jnp.float32).reshape(TILE // BLOCK, BLOCK, TILE)
        scale, factor = scales(x, *own(encode_ref, decode_ref, i, turned), square)
        scaled = (x * factor[:, None]).reshape(TILE, TILE)
        value = xla.nearest(scaled)
        if random_refs:
            column = own_column + (first + j * TILE)
            value = xla.stochastic(scaled, uniform(*random_refs, i, column, turned))
        value = (value.reshape(x.shape) * scale[:, None]).reshape(TILE, TILE).astype(jnp.bfloat16)
        values_ref[rows, columns] = jnp.transpose(value) if turned else value

    for i in range(block_rows // TILE):
        pl.loop(0, block_columns // TILE)(functools.partial(tile, i))


def own(encode_ref: Any, decode_ref: Any, i: int, turned: bool) -> tuple[Array, Array]:
    """The factors of the i-th tile of a block's rows."""
    rows, strips = (
        slice(i * TILE, (i + 1) * TILE),
        slice(i * TILE // BLOCK, (i + 1) * TILE // BLOCK),
    )
    return tuple(ref[:, rows] if turned else ref[strips, :] for ref in (encode_ref, decode_ref))


def scales(
    x: Float[Array, "8 16 128"], encode: Array, decode: Array, square: bool
) -> tuple[Float[Array, "8 128"], Float[Array, "8 128"]]:
    """The scale of each block of a tile, and what its elements are multiplied by."""
    largest = jnp.max(jnp.abs(x), axis=1)
    largest = _largest_of_lanes(largest) if square else largest
    scale = xla.nearest_e4m3(jnp.minimum(largest * encode, 448))
    return scale, jnp.minimum(1 / (scale * decode), xla.LARGEST)


def uniform(
    word_ref: Any, hashed_ref: Any, i: int, column: Int[Array, "128 128"], turned: bool
) -> Float[Array, "128 128"]:
    """The random numbers of a tile, in whose rows and columns its elements' stand, or turned."""
    row = jnp.broadcast_to(hashed_ref[:, i * TILE : (i + 1) * TILE], (TILE, TILE))
    column = column * np.uint32(random.COLUMN).astype(np.int32) + word_ref[0]
    return random.uniform_of(row if turned else jnp.transpose(row), column)


def _transformed(x: Float[Array, "128 128"]) -> Float[Array, "128 128"]:
    """The Hadamard transform of each 16 rows, rounded to bfloat16; sums in float32."""
    row, column = (lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
    both = row & column & (BLOCK - 1)
    for shift in (2, 1):  # the parity of the bits that both have
        both ^= both >> shift
    signs = sum(1 << i for i, sign in enumerate(xla.SIGNS) if sign < 0)
    flips = both ^ lax.shift_right_logical(jnp.full_like(row, signs), column & (BLOCK - 1))
    matrix = jnp.where(flips & 1 == 1, -0.25, 0.25)
    matrix = jnp.where(row & -BLOCK == column & -BLOCK, matrix, 0).astype(jnp.bfloat16)
    return jnp.dot(matrix, x.astype(jnp.bfloat16), preferred_element_type=jnp.float32).astype(
        jnp.bfloat16
    )


def _largest_of_lanes(x: Float[Array, "n 128"]) -> Float[Array, "n 128"]:
    """The largest of each 16 lanes, in all of them: maxima with the lane that differs by a bit."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    for bit in (1, 2, 4, 8):
        left, right = pltpu.roll(x, bit, 1), pltpu.roll(x, x.shape[1] - bit, 1)
        x = jnp.maximum(x, jnp.where(lane & bit == 0, right, left))
    return x


def _factors(amax: Array, height: int, block_rows: int, *, turned: bool) -> tuple[Array, Array]:
    """For each 16 rows, what their blocks' largest magnitudes are multiplied by to be scales, and
    what scales are multiplied by before elements are divided by them; laid out as tiles want it."""
    encode = xla.encoding(amax.astype(jnp.float32))
    both = []
    for factor in (encode * jnp.float32(1 / 6), 1 / encode):
        strips = jnp.broadcast_to(factor.reshape(-1), (height // BLOCK,))
        strips = _filled(strips, block_rows // BLOCK, 1)
        both.append(
            jnp.repeat(strips, BLOCK)[None]
            if turned
            else jnp.broadcast_to(strips[:, None], (strips.shape[0], TILE))
        )
    return tuple(both)


def _filled(array: Array, step: int, value: int) -> Array:
    return jnp.pad(array, (0, -array.shape[0] % step), constant_values=value)


def _signed(words: Any) -> Array:
    """uint32 as the int32 of the same bits, which is what the vector unit multiplies."""
    return lax.bitcast_convert_type(jnp.asarray(words, jnp.uint32), jnp.int32)
