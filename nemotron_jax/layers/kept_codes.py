"""A weight's codes beside its master, for the products of one optimizer step."""

from flax import nnx

from nemotron_jax.quant.codes import Codes
from nemotron_jax.sharding import shard_parameter
from nemotron_jax.types import Axes


class KeptCodes(nnx.Module):
    """`Codes` as a module carries them, laid out as the matrix with these logical axes is."""

    def __init__(self, codes: Codes, axes: Axes) -> None:
        self.codes = nnx.Param(shard_parameter(codes.codes, axes), axes=axes)
        self.scales = nnx.Param(shard_parameter(codes.scales, axes), axes=axes)
        self.amax = nnx.Param(codes.amax, axes=axes[:-2])

    def value(self) -> Codes:
        """The codes as products take them."""
        return Codes(self.codes[...], self.scales[...], self.amax[...])
