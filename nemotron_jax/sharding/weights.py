"""A weight that devices share: which of its parts a product gathers, and which stay."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nemotron_jax.sharding import (
    MESH_AXES,
    OWNERS,
    ROWS,
    SHARES,
    STAYING,
    axis_sizes,
    constrained,
    names_of,
    parameter_spec,
)
from nemotron_jax.types import Axes, Packed, Weight


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The mesh axes that cut each axis of an array: those whose parts a product gathers, and those
    whose parts stay with their devices."""

    gathered: tuple[tuple[int, tuple[str, ...]], ...] = ()
    kept: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def along(self, axis: int) -> tuple[str, ...]:
        """The mesh axes along which devices have parts of this axis of their own."""
        return dict(self.kept).get(axis, ())

    @property
    def owners(self) -> tuple[str, ...]:
        """Of an array of experts, the mesh axes along which devices have experts of their own."""
        return self.along(0)


def cuts_of(weight: Weight | Packed) -> Cuts:
    """How the devices share a weight, whole experts staying with their owners."""
    if isinstance(weight, Packed):
        words = weight.value.words
        return _cuts(weight.axes(words), words.shape, axis_sizes())
    return _cuts(weight.axes, weight.value.shape, axis_sizes())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(part: jax.Array, cuts: Cuts, dtype: jnp.dtype) -> jax.Array:
    """Inside `local`, a whole weight (of all own experts) from this device's part of it.

    It travels in `dtype`, whose values the result has; its gradient is summed, and scattered over
    the devices, in its own. Outside `local`, and where nothing is cut, the weight as it is.
    """
    return whole(part, cuts, dtype).astype(part.dtype) if cuts.gathered else part


def _gathered_forward(part: jax.Array, cuts: Cuts, dtype: jnp.dtype) -> tuple:
    return gathered(part, cuts, dtype), None


def _gathered_backward(cuts: Cuts, dtype: jnp.dtype, _: None, gradient: jax.Array) -> tuple:
    for axis, names in cuts.gathered:
        gradient = jax.lax.psum_scatter(gradient, names, scatter_dimension=axis, tiled=True)
    return (gradient,)


gathered.defvjp(_gathered_forward, _gathered_backward)


def whole(part: jax.Array, cuts: Cuts, dtype: jnp.dtype) -> jax.Array:
    """What `gathered` gives, in `dtype` and without a gradient: for products with their own."""
    part = part.astype(dtype)
    for axis, names in cuts.gathered:
        part = jax.lax.all_gather(part, names, axis=axis, tiled=True)
    return part


def scattered(gradient: jax.Array, cuts: Cuts) -> jax.Array:
    """This device's part of a whole weight's gradient, summed over the devices that share it: what
    the backward pass of `gathered` gives, at once."""
    (part,) = _gathered_backward(cuts, gradient.dtype, None, gradient)
    # The compiler would add up the gradients of a weight that is used twice, or in a loop, and
    # scatter the sum: several whole ones would be held. It adds nothing across a barrier.
    return jax.lax.optimization_barrier(part) if cuts.gathered else part


def gather_parameter(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, laid out as a parameter with these logical axes, with the parts that devices share."""

    def whole(sizes: Mapping[str, int]) -> PartitionSpec:
        parts = dict(_cuts(axes, x.shape, sizes).gathered)
        spec = parameter_spec(axes, x.shape, sizes)
        kept = lambda axis, entry: tuple(n for n in names_of(entry) if n not in parts.get(axis, ()))
        return PartitionSpec(*(kept(axis, entry) or None for axis, entry in enumerate(spec)))

    return constrained(x, whole)


def max_over_devices(value: jax.Array, *, owners: Sequence[str] = ()) -> jax.Array:
    """The largest of all devices' values inside `local`; the value itself elsewhere. Along `owners`
    devices have values of their own."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for axis in ROWS if axis in manual and axis not in owners)
    return jax.lax.pmax(value, axes) if axes else value


def first_expert(owners: Sequence[str], own: int) -> jax.Array | int:
    """The number of this device's first expert, of which each device along `owners` has `own`."""
    return jax.lax.axis_index(tuple(owners)) * own if owners else 0


def _cuts(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> Cuts:
    """`parameter_spec` by who gathers what."""
    spec = parameter_spec(axes, shape, sizes)
    names = (None,) * (len(spec) - len(axes)) + tuple(axes)
    stays = {"experts": OWNERS, STAYING["experts"]: MESH_AXES}
    shared, kept = [], []
    for axis, (name, entry) in enumerate(zip(names, spec)):
        travel = set(SHARES).difference(stays.get(name, ()) if isinstance(name, str) else ())
        shared.append((axis, tuple(n for n in names_of(entry) if n in travel)))
        kept.append((axis, tuple(n for n in names_of(entry) if n not in travel)))
    some = lambda pairs: tuple(pair for pair in pairs if pair[1])
    return Cuts(some(shared), some(kept))
