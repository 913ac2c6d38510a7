"""A model whose weights were rounded to a lower format, and how far that has moved each of them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, unflatten, variables
from pallas_kernels import nvfp4

FORMATS = ("float32", "bfloat16", "fp8", "nvfp4")
# The largest change of a matrix, over its own size (both root mean squares), that rounding
# explains. Rounding to nearest moves a number by at most 2^-9 of itself in bfloat16, 2^-4 in e4m3;
# of normally distributed numbers 0.0017, 0.027 and 0.095 come out, and a scale that is off by a
# quarter gives 0.25.
LIMITS = {"float32": 1e-6, "bfloat16": 2**-8, "fp8": 2**-4, "nvfp4": 0.16}
_STACKS = ("mamba.", "attention.", "moe.", "mlp.")
_E4M3_LARGEST = 448.0


@dataclasses.dataclass(frozen=True)
class Change:
    """By matrix how far it was moved, over its own size."""

    by_name: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The matrix that was moved furthest."""
        return max(self.by_name.items(), key=lambda item: item[1], default=("", 0.0))


def rounded(model: Nemotron, format: str) -> Nemotron:
    """The model, its layers' weight matrices rounded to a format and back to their own dtype.

    `fp8`: e4m3 with a scale for each matrix. `nvfp4`: blocks of 16 along the summed axis, a scale
    for each, one more for each matrix. Router, convolutions, norms, embedding, head and MTP block
    stay, as in the published recipes.
    """
    if format == "float32":
        return model
    parameters = flatten(model)
    for name in matrices_of(model):
        parameters[name] = _rounded(parameters[name], format)
    return unflatten(model, parameters)


def change(before: Nemotron, after: Nemotron) -> Change:
    """How far the matrices of one model are from those of another of the same shape."""
    first, second = flatten(before), flatten(after)
    return Change({n: float(_distance(first[n], second[n])) for n in matrices_of(before)})


def matrices_of(model: Nemotron) -> list[str]:
    """Names of the weight matrices that lower formats hold."""
    return [
        name
        for name, variable in variables(model).items()
        if name.startswith(_STACKS)
        and type(variable) is nnx.Param
        and len(variable.axes) >= 2
        and variable.axes[0] != "conv_width"
    ]


@jax.jit
def _distance(first: Array, second: Array) -> Array:
    """Of the worst of stacked matrices."""
    first, second = (a.astype(jnp.float32) for a in (first, second))
    square = lambda a: jnp.sum(jnp.square(a), axis=(-2, -1))
    return jnp.sqrt(jnp.max(square(first - second) / jnp.maximum(square(first), 1e-30)))


def _rounded(matrices: Float[Array, "... K N"], format: str) -> Float[Array, "... K N"]:
    dtype, whole = matrices.dtype, matrices.astype(jnp.float32)
    if format == "bfloat16":
        return whole.astype(jnp.bfloat16).astype(dtype)
    one = {"fp8": _fp8, "nvfp4": _nvfp4}[format]
    flat = whole.reshape(-1, *whole.shape[-2:])
    return jax.jit(jax.vmap(one))(flat).reshape(whole.shape).astype(dtype)


def _fp8(matrix: Float[Array, "K N"]) -> Float[Array, "K N"]:
    scale = jnp.maximum(jnp.max(jnp.abs(matrix)), 1e-30) / _E4M3_LARGEST
    return (matrix / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale


def _nvfp4(matrix: Float[Array, "K N"]) -> Float[Array, "K N"]:
    return nvfp4.dequantize(nvfp4.quantize(matrix.T, block=(1, 16), pad=True)).T
