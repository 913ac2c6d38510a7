"""The definition of NVFP4 quantisation, of its Hadamard transform and of MXFP8, in float32.

Source: NVIDIA TransformerEngine's NVFP4 and MXFP8 recipes; "Pretraining LLMs with NVFP4",
arXiv:2509.25149, appendix B.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0..7; bit 3 is the sign
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # of the Hadamard transform
LARGEST = 3.4028235e38
REACH = 2688  # the largest code, 6, times the largest scale of a block, 448


def quantize(
    x: Float[Array, "R C"],
    block: tuple[int, int],
    random: Float[Array, "R C"] | None = None,
    amax: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Codes [R, C], float8 block scales [R/r, C/c] and the largest magnitude of x [R, C]."""
    x = x.astype(jnp.float32)
    height, width = block
    tiles = x.reshape(x.shape[0] // height, height, x.shape[1] // width, width)
    amax = jnp.max(jnp.abs(x)) if amax is None else amax
    encode = jnp.minimum(REACH / amax, LARGEST)
    encode = jnp.where((amax == 0) | (encode == 0), 1.0, encode)
    # The product with the rounded sixth is TransformerEngine's; dividing by six rounds elsewhere.
    scales = jnp.max(jnp.abs(tiles), (1, 3)) * (encode * jnp.float32(1 / 6))
    scales = jnp.minimum(scales, 448).astype(jnp.float8_e4m3fn)
    factor = jnp.minimum(1 / (scales.astype(jnp.float32) * (1 / encode)), LARGEST)
    scaled = (tiles * factor[:, None, :, None]).reshape(x.shape)
    magnitude = nearest(jnp.abs(scaled)) if random is None else stochastic(jnp.abs(scaled), random)
    code = jnp.searchsorted(jnp.array(MAGNITUDES), magnitude).astype(jnp.uint8)
    return jnp.where(jnp.signbit(scaled), code + 8, code).astype(jnp.uint8), scales, amax


def dequantize(
    codes: UInt8[Array, "R C"], scales: Array, amax: Array | float, block: tuple[int, int]
) -> Float[Array, "R C"]:
    """float32 [R, C] of codes [R, C] and their scales."""
    magnitude = jnp.array(MAGNITUDES)[codes % 8]
    value = jnp.where(codes >= 8, -magnitude, magnitude)
    scale = jnp.repeat(jnp.repeat(scales.astype(jnp.float32), block[0], 0), block[1], 1)
    return value * scale * (amax / REACH)


def nearest(magnitude: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest E2M1 magnitude; a tie goes to the even code, all beyond 6 to 6."""
    grid = jnp.array(MAGNITUDES)
    low = jnp.clip(jnp.searchsorted(grid, magnitude, side="right") - 1, 0, 6)
    below, above = magnitude - grid[low], grid[low + 1] - magnitude
    up = (below > above) | ((below == above) & (low % 2 == 1))
    return jnp.where(jnp.isnan(magnitude), jnp.nan, grid[low + up])


def stochastic(magnitude: Float[Array, "..."], random: Float[Array, "..."]) -> Float[Array, "..."]:
    """The E2M1 magnitude above with the probability of how far the way there is gone.

    `random` is uniform in [0, 1).
    """
    grid = jnp.array(MAGNITUDES)
    magnitude = jnp.minimum(magnitude, 6)
    low = jnp.clip(jnp.searchsorted(grid, magnitude, side="right") - 1, 0, 6)
    fraction = (magnitude - grid[low]) / (grid[low + 1] - grid[low])
    return jnp.where(jnp.isnan(magnitude), jnp.nan, grid[low + (fraction + random >= 1)])


def hadamard(x: Float[Array, "R C"]) -> Float[Array, "C R"]:
    """bfloat16 [C, R]: the transform of xᵀ [C, R] in blocks of 16 along R, x in bfloat16."""
    matrix = jnp.array([[1.0]])
    for _ in range(4):
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    matrix = jnp.array(SIGNS)[:, None] * matrix / 4
    blocks = x.astype(jnp.bfloat16).astype(jnp.float32).T.reshape(x.shape[1], -1, 16)
    return (blocks @ matrix).reshape(x.shape[1], x.shape[0]).astype(jnp.bfloat16)


def quantize_mxfp8(x: Float[Array, "R C"]) -> tuple[Array, UInt8[Array, "R C/32"]]:
    """float8 values [R, C] and biased power-of-two exponents uint8 [R, C/32] of blocks of 32."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, 32)
    fraction, exponent = jnp.frexp(jnp.max(jnp.abs(blocks), -1) / 448)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)  # the next power of two up
    exponent = jnp.where(fraction == 0, -127, jnp.clip(exponent, -127, 127))
    values = jnp.clip(jnp.ldexp(blocks, -exponent[..., None]), -448, 448)
    return values.reshape(x.shape).astype(jnp.float8_e4m3fn), (exponent + 127).astype(jnp.uint8)
