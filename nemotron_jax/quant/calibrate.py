"""Matrices rounded to the codes of a checkpoint, by several ways to choose their scales."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import nvfp4
from pallas_kernels.nvfp4 import xla

METHODS = ("max", "mse", "four_over_six")
_LARGEST = 6.0  # of E2M1
# What the largest block scale becomes. Four-over-six needs room above it: a block's largest
# magnitude may be stored as a 4, under a scale half as large again. Source: TransformerEngine.
_BOUND = {"max": 448.0, "mse": 448.0, "four_over_six": 256.0}
# Scales that MSE tries beside the largest magnitude's, in steps of E4M3's codes: eight to a binade,
# so from half as large to a third larger. Fewer find less; beyond them no block of 16 gains.
_STEPS = (-1, 1, -2, 2, -3, 3, -4, -5, -6, -7, -8)
_CODE_OF_448 = 0x7E  # E4M3's largest number; the code above it is NaN
_ULPS = (0, 1, -1, 2, -2)  # units in the last place: two roundings lie between a factor and itself


def nvfp4_codes(
    matrix: Float[Array, "N K"], method: str = "max"
) -> tuple[UInt8[Array, "N K/2"], Float[Array, "N K/16"], Float[Array, ""]]:
    """Codes, two a byte, float8 scales of 16 columns and the float32 factor of both.

    `max` is `nvfp4.quantize`: a block's largest magnitude becomes 6. `mse` takes the E4M3 scale
    under which a block's squared error is least; `four_over_six` that of the two which make its
    largest magnitude 6 or 4. Ties go to `max`'s. K is a multiple of 16. A matrix that is the floats
    of such codes already gets a factor that gives the same floats again, where `max` wrote them.
    """
    if method == "max":
        q = _nearest(matrix)
        steps = jnp.repeat(q.scales.astype(jnp.float32), xla.BLOCK, axis=1)
        numbers = xla.values(nvfp4.unpack(q.codes, implementation="xla"))
        return q.codes, q.scales, _settled(matrix, numbers, steps, q.factor)
    return _searched(matrix, method)


def fp8_codes(matrix: Float[Array, "N K"]) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """float8_e4m3fn codes and the matrix's float32 scale: its largest magnitude / 448, or the one
    under which the codes are the matrix, where there is one."""
    codes, scale = _fp8(matrix)
    return codes, _settled(matrix, codes.astype(jnp.float32), jnp.ones((1, 1)), scale)


@jax.jit
def _nearest(matrix: Array) -> nvfp4.Quantized:
    return nvfp4.quantize(matrix.astype(jnp.float32), block=(1, 16))


@jax.jit
def _fp8(matrix: Array) -> tuple[Array, Array]:
    matrix = matrix.astype(jnp.float32)
    amax = jnp.max(jnp.abs(matrix))
    scale = jnp.where(amax > 0, amax / 448, 1.0)
    return jnp.clip(matrix / scale, -448, 448).astype(jnp.float8_e4m3fn), scale


@jax.jit
def _settled(matrix: Array, numbers: Array, steps: Array, factor: Array) -> Array:
    """Of `factor` and the floats beside it the first under which the numbers are the matrix:
    a largest magnitude that was rounded once gives its factor back but for the last digit."""
    best, found = factor, jnp.bool_(False)
    for ulps in _ULPS:
        bits = jax.lax.bitcast_convert_type(factor, jnp.int32) + ulps
        near = jax.lax.bitcast_convert_type(bits, jnp.float32)
        same = jnp.all(numbers * (steps * near) == matrix)
        best = jnp.where(same & ~found, near, best)
        found |= same
    return best


@functools.partial(jax.jit, static_argnums=1)
def _searched(matrix: Array, method: str) -> tuple[Array, Array, Array]:
    blocks = matrix.astype(jnp.float32).reshape(matrix.shape[0], -1, xla.BLOCK)
    amax = jnp.max(jnp.abs(blocks))
    factor = jnp.where(amax > 0, amax / (_LARGEST * _BOUND[method]), 1.0)
    wanted = jnp.max(jnp.abs(blocks), axis=-1) / factor / _LARGEST
    first = _rounded(wanted)
    tried = [_rounded(wanted * 1.5)] if method == "four_over_six" else _neighbours(first)
    best, least = first, _error(blocks, first, factor)
    for scales in tried:
        error = _error(blocks, scales, factor)
        best = jnp.where(error < least, scales.astype(jnp.float32), best.astype(jnp.float32))
        best, least = best.astype(jnp.float8_e4m3fn), jnp.minimum(error, least)
    codes = xla.codes(_numbers(blocks, best, factor)).astype(jnp.int32).astype(jnp.uint8)
    return nvfp4.pack(codes.reshape(matrix.shape), implementation="xla"), best, factor


def _rounded(scales: Array) -> Array:
    return jnp.minimum(scales, 448).astype(jnp.float8_e4m3fn)


def _neighbours(scales: Array) -> list[Array]:
    code = jax.lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    near = (jnp.clip(code + step, 1, _CODE_OF_448).astype(jnp.uint8) for step in _STEPS)
    return [jax.lax.bitcast_convert_type(one, jnp.float8_e4m3fn) for one in near]


def _numbers(blocks: Array, scales: Array, factor: Array) -> Array:
    """The nearest E2M1 numbers of the blocks under their scales."""
    step = scales.astype(jnp.float32) * factor
    return xla.nearest(blocks * jnp.minimum(1 / step, xla.LARGEST)[..., None])


def _error(blocks: Array, scales: Array, factor: Array) -> Float[Array, "N K/16"]:
    step = (scales.astype(jnp.float32) * factor)[..., None]
    return jnp.sum(jnp.square(_numbers(blocks, scales, factor) * step - blocks), axis=-1)
