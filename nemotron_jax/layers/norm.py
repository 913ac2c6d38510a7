"""Root-mean-square norms, plain and gated by groups."""

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
        return rms_norm(x.astype(jnp.float32), self.weight[...], self.epsilon).astype(x.dtype)


class GatedGroupNorm(nnx.Module):
    """Mamba-2's output norm: gate first, then norm each group's channels apart."""

    def __init__(self, width: int, num_groups: int, epsilon: float) -> None:
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.weight = nnx.Param(jnp.ones(width, jnp.float32), axes=("mamba_inner",))

    def __call__(self, y: Float[Array, "... I"], z: Float[Array, "... I"]) -> Float[Array, "... I"]:
        gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        groups = gated.reshape(*gated.shape[:-1], self.num_groups, -1)
        weight = self.weight[...].reshape(groups.shape[-2:])
        return rms_norm(groups, weight, self.epsilon).reshape(y.shape).astype(y.dtype)


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "... D"], epsilon: float
) -> Float[Array, "... D"]:
    """`x` over the root of its mean square along the last axis, times `weight`; all float32."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x * scale * weight.astype(jnp.float32)
