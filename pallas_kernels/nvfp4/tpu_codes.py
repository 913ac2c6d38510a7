"""NVFP4's codes on TPU: quantised and packed in one pass, and packed codes taken apart.

Two neighbours along the lanes make a byte. Lanes do not come together cheaply, except in the matrix
unit: packing is a product with a matrix of ones and sixteens, taking apart one with ones, and both
are exact, for codes and bytes are whole numbers below 256. Tiles and scales are `pallas_tpu`'s.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8, UInt32

from pallas_kernels.nvfp4 import pallas_tpu, xla
from pallas_kernels.nvfp4.pallas_tpu import BLOCK, TILE, Interpret


def quantize(
    x: Float[Array, "R C"],
    words: UInt32[Array, "2"] | None,
    rows: Int[Array, "R"] | None,
    amax: Array,
    *,
    block: tuple[int, int],
    interpret: Interpret = False,
) -> tuple[UInt8[Array, "R C/2"], Array]:
    """Packed codes and float8 scales, one for each block."""
    (height, width), turned = x.shape, block == (1, BLOCK)
    block_rows, block_columns = pallas_tpu.block_sizes(height, width, 2 * TILE)
    inputs, specs = pallas_tpu.operands(
        x, words, rows, amax, block_rows, block_columns, turned=turned
    )
    scales_shape = (width // BLOCK, height) if turned else (height // BLOCK, width)
    scales_block = (
        pl.BlockSpec((block_columns // BLOCK, block_rows), lambda i, j: (j, i))
        if turned
        else pl.BlockSpec((block_rows // BLOCK, block_columns), lambda i, j: (i, j))
    )
    codes, scales = pl.pallas_call(
        functools.partial(_quantize_kernel, turned=turned, square=block == (BLOCK, BLOCK)),
        grid=(-(-height // block_rows), width // block_columns),
        in_specs=specs,
        out_specs=[_half(block_rows, block_columns), scales_block],
        out_shape=[
            jax.ShapeDtypeStruct((height, width // 2), jnp.uint8),
            jax.ShapeDtypeStruct(scales_shape, jnp.float32),
        ],
        compiler_params=_parallel(),
        name="nvfp4_quantize",
        interpret=interpret,
    )(*inputs)
    scales = scales.T if turned else scales[:, :: block[1]]
    return codes, scales.astype(jnp.float8_e4m3fn)


def pack(codes: UInt8[Array, "R C"], *, interpret: Interpret = False) -> UInt8[Array, "R C/2"]:
    """Two codes a byte, the even column's in the low four bits."""
    return _over_tiles(_pack_kernel, codes, codes.shape[1] // 2, "nvfp4_pack", interpret)


def unpack(packed: UInt8[Array, "R C/2"], *, interpret: Interpret = False) -> UInt8[Array, "R C"]:
    """The codes that `pack` put together."""
    return _over_tiles(_unpack_kernel, packed, packed.shape[1] * 2, "nvfp4_unpack", interpret)


def unsupported(x: Array, *_: Any, **options: Any) -> str | None:
    """Why this matrix cannot be quantised, or None: pairs of columns fill 128 lanes too."""
    if x.shape[1] % (2 * TILE):
        return f"x has {x.shape[1]} columns; the kernel takes multiples of {2 * TILE}"
    return pallas_tpu.unsupported(x)


def unsupported_packing(codes: Array) -> str | None:
    """Why these codes cannot be packed, or None: whole bytes of them fill 128 lanes."""
    if codes.ndim != 2 or codes.shape[1] % (2 * TILE):
        return f"codes are {codes.shape}; the kernel takes matrices of {2 * TILE} columns each"
    return None


def unsupported_unpacking(packed: Array) -> str | None:
    """Why these bytes cannot be taken apart, or None: they fill 128 lanes."""
    if packed.ndim != 2 or packed.shape[1] % TILE:
        return f"packed codes are {packed.shape}; the kernel takes matrices of {TILE} columns each"
    return None


def _quantize_kernel(
    x_ref,  # [rows, columns]
    encode_ref,  # [1, rows] float32 where tiles are turned over, else [rows/16, 128]
    decode_ref,  # likewise
    *refs,  # a random word [1], hashed rows [1, rows], both int32, if any; then
    # packed codes [rows, columns/2]; scales [columns/16, rows] float32 if turned, else
    # [rows/16, columns], each block's in all its columns
    turned,
    square,
):
    *random_refs, codes_ref, scales_ref = refs
    block_rows, block_columns = x_ref.shape
    first = pl.program_id(1) * block_columns  # asked here, for the loops' bodies cannot
    own_column = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0 if turned else 1)

    def codes(i: int, column: Any) -> Float[Array, "128 128"]:
        x = x_ref[pl.ds(i * TILE, TILE), pl.ds(column, TILE)]
        x = (jnp.transpose(x) if turned else x).astype(jnp.float32).reshape(-1, BLOCK, TILE)
        factors = pallas_tpu.own(encode_ref, decode_ref, i, turned)
        scale, factor = pallas_tpu.scales(x, *factors, square)
        strips, blocks = pl.ds(i * TILE // BLOCK, TILE // BLOCK), TILE // BLOCK
        if turned:
            place = pl.multiple_of(lax.div(column, BLOCK), blocks)
            scales_ref[pl.ds(place, blocks), i * TILE : (i + 1) * TILE] = scale
        else:
            scales_ref[strips, pl.ds(column, TILE)] = scale
        scaled = (x * factor[:, None]).reshape(TILE, TILE)
        value = xla.nearest(scaled)
        if random_refs:
            drawn = pallas_tpu.uniform(*random_refs, i, own_column + (first + column), turned)
            value = xla.stochastic(scaled, drawn)
        code = xla.codes(value)
        return jnp.transpose(code) if turned else code

    def pair(i: int, j: Any) -> None:
        column = pl.multiple_of(j * 2 * TILE, 2 * TILE)
        place = pl.ds(pl.multiple_of(j * TILE, TILE), TILE)
        both = codes(i, column), codes(i, pl.multiple_of(column + TILE, TILE))
        codes_ref[pl.ds(i * TILE, TILE), place] = _packed(*both)

    for i in range(block_rows // TILE):
        pl.loop(0, block_columns // (2 * TILE))(functools.partial(pair, i))


def _pack_kernel(
    codes_ref,  # [rows, 2 columns]
    packed_ref,  # [rows, columns]
):
    for j in range(packed_ref.shape[1] // TILE):
        both = (codes_ref[:, (2 * j + k) * TILE : (2 * j + k + 1) * TILE] for k in (0, 1))
        packed_ref[:, j * TILE : (j + 1) * TILE] = _packed(*map(_whole, both))


def _unpack_kernel(
    packed_ref,  # [rows, columns]
    codes_ref,  # [rows, 2 columns]
):
    row, column = _places()
    for j in range(codes_ref.shape[1] // TILE):
        place = slice(j // 2 * TILE, (j // 2 + 1) * TILE)
        byte = packed_ref[:, place].astype(jnp.int32)
        # Column c of the codes is in byte c // 2 of its own: low where c is even, else high.
        from_byte = row == (column >> 1) + j % 2 * (TILE // 2)
        low, high = (jnp.where(from_byte & (column & 1 == odd), 1.0, 0.0) for odd in (0, 1))
        codes = _dot(_float(byte & 15), low) + _dot(_float(byte >> 4), high)
        codes_ref[:, j * TILE : (j + 1) * TILE] = codes.astype(jnp.int32).astype(jnp.uint8)


def _packed(left: Float[Array, "n 128"], right: Float[Array, "n 128"]) -> UInt8[Array, "n 128"]:
    """Bytes of two tiles of codes that lie beside each other."""
    row, column = _places()
    value = jnp.where(row & 1 == 0, 1.0, 16.0)
    halves = (jnp.where((row >> 1) + half == column, value, 0.0) for half in (0, TILE // 2))
    both = sum(_dot(tile, half) for tile, half in zip((left, right), halves, strict=True))
    return both.astype(jnp.int32).astype(jnp.uint8)


def _dot(left: Float[Array, "n 128"], right: Float[Array, "128 128"]) -> Float[Array, "n 128"]:
    narrow = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)  # exact: below 256
    return jnp.dot(*narrow, preferred_element_type=jnp.float32)


def _places() -> tuple[Int[Array, "128 128"], Int[Array, "128 128"]]:
    return tuple(lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))


def _whole(codes: UInt8[Array, "n 128"]) -> Float[Array, "n 128"]:
    return _float(codes.astype(jnp.int32))


def _float(whole: Int[Array, "n 128"]) -> Float[Array, "n 128"]:
    return whole.astype(jnp.float32)


def _half(rows: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, columns // 2), lambda i, j: (i, j))


def _parallel() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"))


def _over_tiles(
    kernel: Any, array: UInt8[Array, "R _"], width: int, name: str, interpret: Interpret
) -> UInt8[Array, "R _"]:
    """A kernel over blocks of rows and of whole tiles of columns of two byte arrays."""
    widest = max(width, array.shape[1])
    rows, columns = pallas_tpu.block_sizes(array.shape[0], widest, 2 * TILE)
    full, half = pl.BlockSpec((rows, columns), lambda i, j: (i, j)), _half(rows, columns)
    packs = array.shape[1] == widest
    return pl.pallas_call(
        kernel,
        grid=(-(-array.shape[0] // rows), widest // columns),
        in_specs=[full if packs else half],
        out_specs=half if packs else full,
        out_shape=jax.ShapeDtypeStruct((array.shape[0], width), jnp.uint8),
        compiler_params=_parallel(),
        name=name,
        interpret=interpret,
    )(array)
