"""Tokens travel to the devices that own their experts, and the weighted sums travel back."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from nemotron_jax.sharding import row_axes
from nemotron_jax.sharding.weights import cuts_of, first_expert
from nemotron_jax.types import Weight


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How tokens inside `local` reach the devices that own their experts, and sums come back.

    Devices along `owners` have experts of their own. Along those of them in `rows` they have rows
    of their own too, which all of these devices then read; along the others all have the same rows.
    """

    owners: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    devices: int = 1  # of one group of owners

    @staticmethod
    def of(experts: Weight, rows: int) -> "Exchange":
        """Of the devices that share these experts, and a batch of so many rows."""
        owners, split = cuts_of(experts).owners, row_axes(rows)
        sizes = jax.sharding.get_abstract_mesh().shape
        devices = math.prod(sizes[axis] for axis in owners)
        return Exchange(owners, tuple(axis for axis in owners if axis in split), devices)

    def to_owners(self, tokens: jax.Array | None) -> jax.Array | None:
        """Of all devices that share the experts, the tokens [N, ...], one device's after another's.

        Floats travel as they are; their gradients are summed in float32.
        """
        if tokens is None or not self.rows:
            return tokens
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return _joined(tokens, self.rows)
        return jax.lax.all_gather(tokens, self.rows, axis=0, tiled=True)

    def from_owners(self, sums: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """This device's tokens [N, ...] of the sum, over the owners, of what each made of all.

        Added up as the sums are, then in `dtype`; so is their gradient, and it travels in that.
        """
        same = tuple(axis for axis in self.owners if axis not in self.rows)
        sums = jax.lax.psum(sums, same) if same else sums
        return _scattered(sums, self.rows, dtype) if self.rows else sums.astype(dtype)

    def among_all(self, own: jax.Array, experts: int) -> jax.Array:
        """Numbers of this device's experts among those of all `experts`, which are zeros.

        The sum over all that share rows has each once: owners of the same rows are added up here.
        """
        if not self.owners:
            return own
        start = first_expert(self.owners, own.shape[0])
        numbers = jax.lax.dynamic_update_slice(jnp.zeros(experts, own.dtype), own, (start,))
        same = tuple(axis for axis in self.owners if axis not in self.rows)
        return jax.lax.psum(numbers, same) if same else numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joined(part: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(part, names, axis=0, tiled=True)


def _joined_forward(part: jax.Array, names: tuple[str, ...]) -> tuple:
    return _joined(part, names), None


def _joined_backward(names: tuple[str, ...], _: None, gradient: jax.Array) -> tuple:
    sums = gradient.astype(jnp.float32)  # in bfloat16 each device on the way would round it
    part = jax.lax.psum_scatter(sums, names, scatter_dimension=0, tiled=True)
    return (part.astype(gradient.dtype),)


_joined.defvjp(_joined_forward, _joined_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scattered(sums: jax.Array, names: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.lax.psum_scatter(sums, names, scatter_dimension=0, tiled=True).astype(dtype)


def _scattered_forward(sums: jax.Array, names: tuple[str, ...], dtype: jnp.dtype) -> tuple:
    return _scattered(sums, names, dtype), jnp.zeros((), sums.dtype)


def _scattered_backward(
    names: tuple[str, ...], dtype: jnp.dtype, like: jax.Array, gradient: jax.Array
) -> tuple:
    whole = jax.lax.all_gather(gradient, names, axis=0, tiled=True)
    return (whole.astype(like.dtype),)


_scattered.defvjp(_scattered_forward, _scattered_backward)
