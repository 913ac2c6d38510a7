"""SSM states in 16 bits: rounded so that the error of a long recurrence does not add up."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.model.cache import Cache
from pallas_kernels import nvfp4

_WORDS = (0x5353_4D00, 0x9E37_79B9)  # any two: those of this use, and of no other
_SMALLEST_EXPONENT = -14  # of float16's normal numbers; the steps below are those at it
_FRACTION_BITS = 10  # of float16: so many below the leading one


def stochastic_float16(x: Float[Array, "*A"], uniform: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """x in float16, at either neighbour with a chance that makes its mean x.

    `uniform` in [0, 1) decides. What is past the largest number becomes that.
    """
    x = x.astype(jnp.float32)
    exponent = jnp.maximum(jnp.frexp(x)[1] - 1, _SMALLEST_EXPONENT)
    step = exponent - _FRACTION_BITS
    whole = jnp.floor(jnp.ldexp(x, -step) + uniform)
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(jnp.ldexp(whole, step), -largest, largest).astype(jnp.float16)


def keep_states(cache: Cache, like: Cache, rounding: str) -> Cache:
    """The cache with SSM states in the dtypes that those of `like` have.

    The random bits hang on layer, length and place alone, so that a text is rounded alike wherever
    it runs. `rounding` is "stochastic" or "nearest".
    """

    def narrow(layer: int, ssm: Array) -> Array:
        if rounding == "nearest":
            return ssm.astype(jnp.float16)
        return stochastic_float16(ssm, _uniform(layer, cache.length, ssm))

    return cache.rounded(like, narrow)


def _uniform(layer: int, length: Int[Array, "B"], ssm: Float[Array, "B M P N"]) -> Array:
    words = nvfp4.fold(jnp.array(_WORDS, jnp.uint32), layer)
    heads, columns = jnp.arange(ssm.shape[1]), ssm.shape[2] * ssm.shape[3]
    row = lambda at: nvfp4.uniform(nvfp4.fold(words, at), heads, columns)
    return jax.vmap(row)(length).reshape(ssm.shape)
