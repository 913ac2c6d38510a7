"""Weights quantised once and kept as codes: all products of a step, forward and backward, find the
same operands that they would make of the masters."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from nemotron_jax.config.precision import NVFP4, PrecisionConfig
from pallas_kernels import nvfp4
from pallas_kernels.nvfp4 import xla

BLOCK = 16  # rows and columns that share a scale: square, so that the transpose has the same


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix in NVFP4 by square blocks, after any axes of layers and experts; sides are filled up
    to whole blocks. It takes 0.504 bytes a weight."""

    codes: UInt8[Array, "... In Out/2"]  # two columns a byte, the even one in the low half
    scales: Float[Array, "... In/16 Out/16"]  # float8_e4m3fn
    amax: Float[Array, "..."]  # float32: the largest magnitude that it is scaled by

    def operand(self) -> tuple[Float[Array, "... In Out"], Float[Array, "..."]]:
        """What `operands.quantized` makes of the matrix: the operand, and the factor of the
        product."""
        pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
        numbers = xla.values(pairs.reshape(*self.codes.shape[:-1], -1))
        steps = self.scales.astype(jnp.float32)
        *leading, rows, columns = steps.shape
        wide = (*leading, rows, BLOCK, columns, BLOCK)
        steps = jnp.broadcast_to(steps[..., :, None, :, None], wide)
        return numbers * steps.reshape(numbers.shape), self.amax / xla.REACH


def is_kept(role: str, precision: PrecisionConfig) -> bool:
    """Whether a role's weights are the same codes in both products, and so kept: NVFP4's square
    blocks. MXFP8's blocks, and NVFP4's of one row, run along each product's own contraction."""
    return precision.formats.get(role) == NVFP4 and precision.nvfp4.weight_block == "16x16"


def quantized_once(weights: Sequence[Float[Array, "... In _"]], leading: int) -> list[Codes]:
    """The codes of weights which share one largest magnitude as one matrix would: that of each
    layer, and of each expert, along the `leading` axes."""
    sides = tuple(range(leading, weights[0].ndim))
    each = [jnp.max(jnp.abs(weight), axis=sides).astype(jnp.float32) for weight in weights]
    amax = functools.reduce(jnp.maximum, each)
    return [_quantized(weight, amax, leading) for weight in weights]


def _quantized(weight: Array, amax: Array, leading: int) -> Codes:
    fill = [(0, -size % BLOCK) for size in weight.shape[leading:]]
    weight = jnp.pad(weight, [(0, 0)] * leading + fill)

    def one(matrix: Array, amax: Array) -> tuple[Array, Array]:
        return xla.quantize(matrix, (BLOCK, BLOCK), None, amax)

    for _ in range(leading):
        one = jax.vmap(one)
    codes, scales = one(weight, amax)
    # Devices may share the columns, and no kernel takes a part of an array.
    return Codes(nvfp4.pack(codes, implementation="xla"), scales, amax)
