"""Matrices of experts that stay the codes that they are stored as."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from nemotron_jax.sharding import on_owners, shard_parameter, staying
from nemotron_jax.types import Array, Packed
from pallas_kernels import PackedExperts, quantize_experts


class PackedMatrix(nnx.Module):
    """Matrices [E, K, N] of experts in NVFP4, after any axes of layers; how they lie says
    `PackedExperts`."""

    def __init__(
        self,
        words: Float[Array, "... E 2 B C"],
        scales: Float[Array, "... E B C"],
        factor: Float[Array, "... E"],
        *,
        depth: int,
        width: int,
        axes: tuple[str, ...],
    ) -> None:
        experts = axes[0]  # devices share whole experts
        self.words = nnx.Param(words, axes=(experts, None, None, None))
        self.scales = nnx.Param(scales, axes=(experts, None, None))
        self.factor = nnx.Param(factor, axes=(experts,))
        self.depth, self.width = depth, width  # K, N
        self.axes = axes  # of the matrices
        self.is_base = False  # whether adapters train beside it, somewhere in its model

    @classmethod
    def of(cls, matrices: nnx.Param) -> "PackedMatrix":
        """Each matrix rounded to the nearest NVFP4 numbers, under its own largest magnitude.

        On the mesh at hand each device rounds, and then holds, whole matrices of its own.
        """
        experts = matrices.axes[0]
        packed = _rounded_by_owners(matrices[...], experts)
        factor = shard_parameter(packed.factor, (experts,))  # a vector is whole everywhere
        sizes = {"depth": packed.depth, "width": packed.width}
        return cls(packed.words, packed.scales, factor, **sizes, axes=matrices.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices that the codes stand for, any axes of layers first."""
        return (*self.factor.shape, self.depth, self.width)

    def weight(self, name: str) -> Packed:
        """The matrices as their product takes them; `name` says in errors whose they are."""
        arrays = self.words[...], self.scales[...], self.factor[...]
        value = PackedExperts(*arrays, self.depth, self.width)
        return Packed(value, name, self.is_base, self._experts)

    def unpacked(self, dtype: jnp.dtype) -> nnx.Param:
        """The floats that the codes stand for, each rounded once to `dtype`."""
        leading = self.factor.shape
        arrays = [self.words[...], self.scales[...], self.factor[...]]
        flat = (array.reshape(-1, *array.shape[len(leading) :]) for array in arrays)
        values = PackedExperts(*flat, self.depth, self.width).matrices(dtype)
        axes = self.axes if self.axes[0] == self._experts else staying(self.axes)
        return nnx.Param(values.reshape(*leading, *values.shape[1:]), axes=axes)

    @property
    def _experts(self) -> str:
        """The axis of the experts: another one in a model whose weights stay where they are."""
        return self.words.axes[0]


@functools.partial(jax.jit, static_argnames="experts")  # compiled once for all of a shape
def _rounded_by_owners(matrices: Float[Array, "... E K N"], experts: str) -> PackedExperts:
    return on_owners(_rounded, matrices, (experts, None, None))


def _rounded(matrices: Float[Array, "... E K N"]) -> PackedExperts:
    *leading, depth, width = matrices.shape
    packed = quantize_experts(matrices.reshape(-1, depth, width))
    return jax.tree.map(lambda array: array.reshape(*leading, *array.shape[1:]), packed)
