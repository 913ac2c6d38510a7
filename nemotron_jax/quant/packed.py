"""Products with matrices that stay codes: they do not train, and adapters beside them do."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from nemotron_jax.sharding.weights import Cuts
from nemotron_jax.types import Packed
from pallas_kernels import (
    PackedExperts,
    grouped_matmul_packed,
    grouped_matmul_packed_transposed,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a product does, but for its arrays; a static argument."""

    name: str  # whose the matrices are, for errors
    is_base: bool  # adapters train beside them: gradients of the inputs pass
    activation: str | None
    implementation: str | None
    target: str | None

    @property
    def kernel(self) -> dict[str, str | None]:
        """The choice of a kernel, as ops of pallas_kernels take it."""
        return {"implementation": self.implementation, "target": self.target}


def product(
    x: Float[Array, "rows K"],
    packed: Packed,
    sizes: Int[Array, "E"],
    cuts: Cuts,
    kernel: dict[str, str | None],
    *,
    activation: str | None = None,
) -> Float[Array, "rows N"]:
    """Rows, sorted by expert, times their expert's matrix, and the activation.

    The codes are this device's part, cut as `cuts` say. Raises ValueError, naming them, where a
    gradient is asked for through them: at all, or of themselves where they are a base.
    """
    settings = Settings(packed.name, packed.is_base, activation, **kernel)
    return _product(settings, x, whole(packed.value, cuts), sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(settings: Settings, x: Array, experts: PackedExperts, sizes: Array) -> Array:
    options = {"activation": settings.activation, **settings.kernel}
    return grouped_matmul_packed(x, experts, sizes, **options)


def _forward(settings: Settings, x, experts, sizes) -> tuple:
    experts = without_gradient(settings, experts)
    x, sizes = values((x, sizes))
    y = grouped_matmul_packed(x, experts, sizes, **settings.kernel)
    if settings.activation is None:
        return y, (experts, sizes, None)
    return jnp.square(jax.nn.relu(y)), (experts, sizes, y)


def _backward(settings: Settings, residuals: tuple, dy: Array | SymbolicZero) -> tuple:
    experts, sizes, before = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None
    if before is not None:
        dy = dy * (2 * jax.nn.relu(before))
    return grouped_matmul_packed_transposed(dy, experts, sizes, **settings.kernel), None, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def without_gradient(settings: Settings, experts: Any) -> PackedExperts:
    """The codes that a product's forward pass is given with symbolic zeros. Raises ValueError where
    a gradient is asked for that they do not give."""
    moved = any(leaf.perturbed for leaf in jax.tree.leaves(experts, is_leaf=_is_primal))
    if moved or not settings.is_base:
        raise ValueError(
            f"{settings.name} are NVFP4 codes, through which no gradient is computed; train "
            "adapters beside them, or unpacked(model)"
        )
    return values(experts)


def values(given: Any) -> Any:
    """A forward pass's arrays, as it is given them with symbolic zeros."""
    return jax.tree.map(lambda primal: primal.value, given, is_leaf=_is_primal)


def _is_primal(node: object) -> bool:
    return hasattr(node, "perturbed")


def whole(experts: PackedExperts, cuts: Cuts) -> PackedExperts:
    """All own experts' codes from this device's part of them, as they travel: bits."""

    def joined(part: Array) -> Array:
        kind = jnp.uint8 if part.dtype == jnp.float8_e4m3fn else jnp.uint32
        bits = jax.lax.bitcast_convert_type(part, kind)
        for axis, names in cuts.gathered:
            bits = jax.lax.all_gather(bits, names, axis=axis, tiled=True)
        return jax.lax.bitcast_convert_type(bits, part.dtype)

    return jax.tree.map(joined, experts) if cuts.gathered else experts
