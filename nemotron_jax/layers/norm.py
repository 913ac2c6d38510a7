"""Root-mean-square norms, plain and gated by groups.

Both keep their operands alone for the backward pass and make the rest again: what they would keep
else is several times that, and a CPU pays for each page of it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` with float32 statistics, in the dtype of `x`."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.weight = nnx.Param(jnp.ones(width, jnp.float32), axes=("width",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.weight[...], self.epsilon)


class GatedGroupNorm(nnx.Module):
    """Mamba-2's output norm: gate first, then norm each group's channels apart."""

    def __init__(self, width: int, num_groups: int, epsilon: float) -> None:
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.weight = nnx.Param(jnp.ones(width, jnp.float32), axes=("mamba_inner",))

    def __call__(self, y: Float[Array, "... I"], z: Float[Array, "... I"]) -> Float[Array, "... I"]:
        grouped = lambda a: a.reshape(*a.shape[:-1], self.num_groups, -1)
        out = gated_rms_norm(*map(grouped, (y, z, self.weight[...])), self.epsilon)
        return out.reshape(y.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], epsilon: float
) -> Float[Array, "... D"]:
    """`x` over the root of its mean square along the last axis, times `weight`, in x's dtype; all
    float32 within."""
    return _normed(x.astype(jnp.float32), weight, epsilon).astype(x.dtype)


def _rms_norm_forward(x: Array, weight: Array, epsilon: float) -> tuple[Array, tuple]:
    return rms_norm(x, weight, epsilon), (x, weight)


def _rms_norm_backward(epsilon: float, kept: tuple, dout: Array) -> tuple[Array, Array]:
    x, weight = kept
    x, dout = jax.lax.optimization_barrier((x, dout))  # made again, not the forward pass's
    dx, dweight = _gradients(x.astype(jnp.float32), weight, dout.astype(jnp.float32), epsilon)
    return dx.astype(x.dtype), dweight


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gated_rms_norm(
    y: Float[Array, "... D"],
    z: Float[Array, "... D"],
    weight: Float[Array, "*groups D"],
    epsilon: float,
) -> Float[Array, "... D"]:
    """`rms_norm` of y silu(z), in y's dtype."""
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    return _normed(gated, weight, epsilon).astype(y.dtype)


def _gated_forward(
    y: Array, z: Array, weight: Array, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    return gated_rms_norm(y, z, weight, epsilon), (y, z, weight)


def _gated_backward(
    epsilon: float, kept: tuple[Array, ...], dout: Array
) -> tuple[Array, Array, Array]:
    y, z, weight = kept
    y, z, dout = jax.lax.optimization_barrier((y, z, dout))
    wide_y, wide_z = y.astype(jnp.float32), z.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(wide_z)
    silu = wide_z * sigmoid
    dgated, dweight = _gradients(wide_y * silu, weight, dout.astype(jnp.float32), epsilon)
    dz = dgated * wide_y * (sigmoid + silu * (1 - sigmoid))
    return (dgated * silu).astype(y.dtype), dz.astype(z.dtype), dweight


gated_rms_norm.defvjp(_gated_forward, _gated_backward)


def _normed(x: Array, weight: Array, epsilon: float) -> Array:
    return x * _scale(x, epsilon) * weight.astype(jnp.float32)


def _scale(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... 1"]:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def _gradients(
    x: Float[Array, "... D"],
    weight: Float[Array, "*groups D"],
    dout: Float[Array, "... D"],
    epsilon: float,
) -> tuple[Float[Array, "... D"], Float[Array, "*groups D"]]:
    """Cotangents of a norm's operands, in float32 and in the weight's dtype."""
    scale, weighted = _scale(x, epsilon), dout * weight.astype(jnp.float32)
    along = scale**3 * jnp.mean(x * weighted, axis=-1, keepdims=True)
    tokens = tuple(range(x.ndim - weight.ndim))
    dweight = jnp.sum(dout * x * scale, axis=tokens)
    return weighted * scale - x * along, dweight.astype(weight.dtype)
