"""NVFP4 and MXFP8 in plain XLA: rounding by float arithmetic, so that the compiler fuses it whole.

Adding and taking away a power of two much larger than a value rounds it, ties to even, to the
spacing of floats at that power: no tables, no gathers and no 4-bit dtypes, on any device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

BLOCK = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # of the Hadamard transform
LARGEST = 3.4028235e38
REACH = 2688  # the largest code, 6, times the largest scale of a block, 448
ONE_BIT = -(1 << 22)  # of a float32 keeps sign, exponent and the mantissa's first bit
ROUNDING = 1.5 * 2**23  # floats of this size are one apart, and so they are down to its negative


def quantize(
    x: Float[Array, "R C"], block: tuple[int, int], random: Array | None, amax: Array
) -> tuple[UInt8[Array, "R C"], Array]:
    """Codes 0..15 and float8 block scales, as the reference defines them."""
    scales, factor = block_scales(block_amax(x, block), encoding(amax))
    scaled = x.astype(jnp.float32) * spread(factor, block)
    value = nearest(scaled) if random is None else stochastic(scaled, random)
    return codes(value).astype(jnp.int32).astype(jnp.uint8), scales.astype(jnp.float8_e4m3fn)


def codes(value: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """The codes 0..15 of E2M1 numbers, as floats."""
    size = jnp.abs(value)
    # Twice the value is 0..4, 6, 8 or 12; comparing is cheaper than looking up.
    code = jnp.where(size < 2, 2 * size, jnp.where(size < 4, size + 2, size / 2 + 4))
    return code + jnp.where(jnp.signbit(value), 8.0, 0.0)


def values(codes: UInt8[Array, "R C"]) -> Float[Array, "R C"]:
    """The E2M1 numbers of codes 0..15, in float32."""
    code = (codes & 7).astype(jnp.int32).astype(jnp.float32)
    magnitude = jnp.where(code < 4, code / 2, jnp.where(code < 6, code - 2, 2 * code - 8))
    return jnp.where(codes >= 8, -magnitude, magnitude)


def round_trip(
    x: Float[Array, "R C"],
    block: tuple[int, int],
    random: Array | None,
    amax: Array,
    *,
    hadamard: bool,
) -> Float[Array, "R C"]:
    """What quantising and dequantising leaves of x, but for the factor amax / REACH: float32.

    Each element is an E2M1 number times a block scale: exact in bfloat16, as are its products.
    `amax` is one number, or one for each 16 rows [R/16, 1].
    """
    x = hadamard_rows(x) if hadamard else x
    # Divided before they are repeated: XLA multiplies by the inverse of what is repeated, and errs.
    encode = encoding(amax)
    encode = jnp.repeat(encode, BLOCK, axis=0) if amax.ndim and block[0] == 1 else encode
    scales, factor = block_scales(block_amax(x, block), encode)
    scaled = x.astype(jnp.float32) * spread(factor, block)
    value = nearest(scaled) if random is None else stochastic(scaled, random)
    return value * spread(scales, block)


def block_amax(x: Float[Array, "R C"], block: tuple[int, int]) -> Float[Array, "R/r C/c"]:
    """The largest magnitude of each block, in float32; NaN where it holds one."""
    height, width = block
    tiles = jnp.abs(x).reshape(x.shape[0] // height, height, x.shape[1] // width, width)
    return jnp.max(tiles, axis=(1, 3)).astype(jnp.float32)


def block_scales(blocks: Float[Array, "r c"], encode: Array) -> tuple[Array, Float[Array, "r c"]]:
    """E4M3 scales of blocks with these largest magnitudes, in float32, and what to multiply
    elements by; `encode` is their tensors' `encoding`."""
    scales = nearest_e4m3(jnp.minimum(blocks * (encode * jnp.float32(1 / 6)), 448))
    return scales, jnp.minimum(1 / (scales * (1 / encode)), LARGEST)


def nearest_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The float8_e4m3fn nearest to numbers from 0 to 448, ties to even, in float32: four
    significant bits, and no finer than 2**-9.

    XLA on a CPU spreads scales before it rounds them: a conversion to float8, which has no
    instruction there, would be made for each element, and take most of a round trip's time.
    """
    large = jnp.maximum(_binade(x), jnp.float32(2**-6)) * jnp.float32(2**-3 * ROUNDING)
    return (x + large) - large


def encoding(amax: Array) -> Array:
    """The factor that brings a tensor of this largest magnitude within the format's 6 times 448."""
    encode = jnp.minimum(REACH / amax, LARGEST)
    return jnp.where((amax == 0) | (encode == 0), 1.0, encode)


def spread(blocks: Float[Array, "r c"], block: tuple[int, int]) -> Float[Array, "R C"]:
    """A number for each block given to each of its elements."""
    (rows, columns), (height, width) = blocks.shape, block
    wide = jnp.broadcast_to(blocks[:, None, :, None], (rows, height, columns, width))
    return wide.reshape(rows * height, columns * width)


def hadamard_rows(x: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """The transform of each 16 consecutive rows, column by column, rounded to bfloat16."""
    blocks = x.astype(jnp.bfloat16).astype(jnp.float32).reshape(-1, BLOCK, x.shape[1])
    signed = blocks * jnp.array(SIGNS, jnp.float32)[:, None]
    return (_butterfly(signed) / 4).reshape(x.shape).astype(jnp.bfloat16)


def hadamard(x: Float[Array, "R C"]) -> Float[Array, "C R"]:
    """The transform of xᵀ in blocks of 16 along R."""
    return hadamard_rows(x).T


def quantize_mxfp8(x: Float[Array, "R C"]) -> tuple[Array, UInt8[Array, "R C/32"]]:
    """float8 values and biased exponents of blocks of 32 along C."""
    exponent = _exponents(block_amax(x, (1, 32)))
    scaled = x.astype(jnp.float32) * spread(_power(-exponent), (1, 32))
    return jnp.clip(scaled, -448, 448).astype(jnp.float8_e4m3fn), (exponent + 127).astype(jnp.uint8)


def round_trip_mxfp8(x: Float[Array, "R C"], block: tuple[int, int]) -> Float[Array, "R C"]:
    """What quantising to MXFP8 in blocks of (1, 32) or (32, 1) leaves of x: float32."""
    exponent = _exponents(block_amax(x, block))
    scaled = jnp.clip(x.astype(jnp.float32) * spread(_power(-exponent), block), -448, 448)
    # Four significant bits, and no finer than 2**-9: the same trick at a spacing for each binade.
    binade = jnp.maximum(_binade(scaled), jnp.float32(2**-6))
    large = binade * jnp.float32(2**-3 * ROUNDING)
    return ((scaled + large) - large) * spread(_power(exponent), block)


def nearest(scaled: Array) -> Array:
    """Signed E2M1 numbers nearest to `scaled`, ties to even, ±6 beyond; NaN stays."""
    magnitude = jnp.minimum(jnp.abs(scaled), 6)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    large = step * ROUNDING
    return jnp.copysign((magnitude + large) - large, scaled)


def stochastic(scaled: Array, random: Array) -> Array:
    """Signed E2M1 numbers below or above `scaled`, unbiased for uniform `random` in [0, 1)."""
    magnitude = jnp.minimum(jnp.abs(scaled), 6)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    raised = magnitude + random * step
    # Down to the grid, which from 1 on has one bit of mantissa and below it only 0.5.
    bits = jax.lax.bitcast_convert_type(raised, jnp.int32) & ONE_BIT
    value = jnp.minimum(jax.lax.bitcast_convert_type(bits, jnp.float32), 6)
    value = jnp.where(raised < 1, jnp.where(raised < 0.5, 0.0, 0.5), value)
    return jnp.copysign(value, scaled)


def _butterfly(blocks: Float[Array, "n 16 C"]) -> Float[Array, "n 16 C"]:
    """Each block of 16 rows times Sylvester's Hadamard matrix: sums and differences, halving."""
    count, _, columns = blocks.shape
    for half in (8, 4, 2, 1):
        pairs = blocks.reshape(count, BLOCK // (2 * half), 2, half, columns)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks = jnp.stack([first + second, first - second], axis=2)
    return blocks.reshape(count, BLOCK, columns)


def _exponents(blocks: Float[Array, "r c"]) -> Array:
    """int32 exponents of the smallest powers of two that bring blocks within 448."""
    bits = jax.lax.bitcast_convert_type(blocks / 448, jnp.int32)
    rounded_up = (bits + 0x7FFFFF) >> 23  # any fraction goes to the next power of two
    return jnp.clip(rounded_up, 0, 254) - 127


def _power(exponent: Array) -> Float[Array, "r c"]:
    """2**exponent, also below the smallest normal float."""
    half = exponent // 2
    two = lambda e: jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)
    return two(half) * two(exponent - half)


def _binade(x: Array) -> Array:
    """The power of two at or below each magnitude; 0 for 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
