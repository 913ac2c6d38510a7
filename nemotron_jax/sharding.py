"""The device mesh, and how every array lies on it; mesh axis names occur here only.

Arrays are global. Dense parts of the model are partitioned by the compiler, from the placement of
parameters and batches and from `shard`; what sorts, scans or calls a kernel runs in `local`, where
each device sees its own part alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemotron_jax.config.run import MeshConfig
from nemotron_jax.types import Axes, Packed, Rows, Weight

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
ROWS = ("data", "fsdp", "expert")  # all share the rows of a batch
# These share matrices, whose parts products gather; but whole experts stay with their `OWNERS`.
SHARES = ("fsdp", "expert", "context")
OWNERS = ("expert", "tensor")

# Logical axes of parameters and of their moments. Of the mesh axes named here, each goes to the
# first axis of an array that names it and that it divides; what it does not divide stays whole.
# An axis may be named with the size of its unit, as ("kv_heads", 128): units are never cut. Heads
# are units, and of Mamba's heads those that share a group of B and C.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "vocabulary": ("tensor",),
    "width": SHARES,
    "mtp_width": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mamba_inner": ("tensor",),
    "mamba_heads": ("tensor",),
    "mamba_groups": ("tensor",),
    "conv_width": (),
    "latent": SHARES,
    # Owners first: what is gathered along the others are experts that follow one another.
    "experts": (*OWNERS, "fsdp", "context"),
    "router_experts": (),
    "expert_hidden": SHARES,
    "mlp_hidden": ("tensor",),
    "rank": (),
}
# Logical axes of batches, activations, caches and losses.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "batch": ROWS,
    "tokens": ("context",),
    "width": (),
    "latent": (),
    "vocabulary": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mamba_inner": ("tensor",),
    "mamba_heads": ("tensor",),
    "mamba_groups": ("tensor",),
    "experts": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a run over the first of `devices`: real, virtual, or of an absent topology.

    The one who makes it enters it with `jax.set_mesh`. Raises ValueError where there are fewer
    devices than the config asks for.
    """
    if config.size > len(devices):
        raise ValueError(
            f"MeshConfig: {config.named} is {config.size} devices, but there are {len(devices)}; "
            "lower one, or on a CPU start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.size}"
        )
    shape = tuple(getattr(config, axis) for axis in MESH_AXES)
    # An axis may take a part of a torus's side: fsdp=128 is half of 8 x 8 x 4 chips.
    placed = create_device_mesh(shape, list(devices)[: config.size], allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def parameter_spec(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a parameter lies on a mesh of these axis sizes.

    `axes` name the last axes of `shape`; those before them are stacked layers. Vectors stay whole:
    they are small, and a gather of one costs more than its memory.
    """
    stacked = len(shape) - len(axes)
    if len(axes) < 2:
        return PartitionSpec()
    return PartitionSpec(*(None,) * stacked, *_spec(PARAMETERS, axes, shape[stacked:], sizes))


def activation_spec(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an activation lies on a mesh of these axis sizes; None names an axis that is whole."""
    return PartitionSpec(*_spec(ACTIVATIONS, axes, shape, sizes))


def parameter_sharding(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """The placement of a parameter, or of its moments, on a mesh."""
    return NamedSharding(mesh, parameter_spec(axes, shape, mesh.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def current_mesh() -> Mesh | None:
    """The mesh that was entered with `jax.set_mesh`; None where none was. Not for traced code."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def target_platform() -> str | None:
    """The platform of the mesh at hand, as pallas_kernels calls it: what a program is compiled for.

    None without a mesh, and where the mesh says only that it is some GPU's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = getattr(device, "platform", None)
    return platform if platform in ("cpu", "tpu") else None


def is_local() -> bool:
    """Whether arrays are one device's own here, as inside `local`: kernels of a device can run."""
    return math.prod(_sizes().values()) == 1


def place_batch(batch: Any) -> Any:
    """This process's rows of a batch as global arrays, split by rows over the mesh.

    Without a mesh the batch stays as it is.
    """
    mesh = current_mesh()
    if mesh is None:
        return batch

    def place(rows: Any) -> jax.Array:
        shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
        spec = activation_spec(("batch",), shape[:1], mesh.shape)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows, shape)

    return jax.tree.map(place, batch)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, an activation with these logical axes, laid out as the table says."""
    return _constrained(x, lambda sizes: activation_spec(axes, x.shape, sizes))


def shard_parameter(x: jax.Array, axes: Axes) -> jax.Array:
    """`x` laid out as a parameter with these logical axes: its gradient, or a copy of it."""
    return _constrained(x, lambda sizes: parameter_spec(axes, x.shape, sizes))


def gather_parameter(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, laid out as a parameter with these logical axes, with the parts that devices share."""

    def whole(sizes: Mapping[str, int]) -> PartitionSpec:
        parts = dict(_cuts(axes, x.shape, sizes).gathered)
        spec = parameter_spec(axes, x.shape, sizes)
        kept = lambda axis, entry: tuple(n for n in _names(entry) if n not in parts.get(axis, ()))
        return PartitionSpec(*(kept(axis, entry) or None for axis, entry in enumerate(spec)))

    return _constrained(x, whole)


def part_shape(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """What each device holds of a parameter with these logical axes, on the mesh at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = _sizes()
    if not sizes:
        return tuple(shape)
    return NamedSharding(mesh, parameter_spec(axes, shape, sizes)).shard_shape(tuple(shape))


def local(
    function: Callable[..., Any], in_axes: Sequence[Any], out_axes: Any
) -> Callable[..., Any]:
    """`function` on each device's own part of its arguments; the function itself without a mesh.

    Arguments and results are pytrees. `in_axes` hold for each argument the logical axes of its
    arrays, activations all, leading ones first (None: whole everywhere); a `Weight`, whose value it
    is; or the class `Weight` or `Rows`, of which it is made and which bring their own. `out_axes`
    are the results', leading axes likewise; a result that has one entry for each device's part
    names it "batch". Rows that the devices do not divide are computed by all of them. Differentiate
    it from outside only.
    """
    sizes = _sizes()
    if math.prod(sizes.values()) == 1:
        return function

    def run(*arguments: Any) -> Any:
        chosen: dict[str, tuple[str, ...]] = {}  # mesh axes by logical axis, found once
        specs = [
            _local_specs(axes, argument, sizes, chosen)
            for axes, argument in zip(in_axes, arguments, strict=True)
        ]
        is_axes = lambda node: (
            isinstance(node, tuple) and all(isinstance(name, str | None) for name in node)
        )
        results = jax.tree.map(
            lambda axes: PartitionSpec(*(chosen.get(name) or None for name in axes)),
            out_axes,
            is_leaf=is_axes,
        )
        mapped = jax.shard_map(function, in_specs=tuple(specs), out_specs=results, check_vma=False)
        return mapped(*arguments)

    return run


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The mesh axes that cut each axis of an array: those whose parts a product gathers, and those
    whose parts stay with their devices."""

    gathered: tuple[tuple[int, tuple[str, ...]], ...] = ()
    kept: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def owners(self) -> tuple[str, ...]:
        """Of an array of experts, the mesh axes along which devices have experts of their own."""
        return dict(self.kept).get(0, ())


def cuts_of(weight: Weight | Packed) -> Cuts:
    """How the devices share a weight, whole experts staying with their owners.

    Raises ValueError for codes on more than one device.
    """
    if isinstance(weight, Packed):
        if math.prod(_sizes().values()) > 1:
            raise ValueError(
                f"{weight.name} are NVFP4 codes, which no mesh shares yet; run on one device, or "
                "take unpacked(model)"
            )
        return Cuts()
    return _cuts(weight.axes, weight.value.shape, _sizes())


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


def row_axes(rows: int) -> tuple[str, ...]:
    """The mesh axes along which devices share a batch of so many rows, inside `local`."""
    return _fitting(ACTIVATIONS["batch"], rows, _sizes(), set())


def first_expert(owners: Sequence[str], own: int) -> jax.Array | int:
    """The number of this device's first expert, of which each device along `owners` has `own`."""
    return jax.lax.axis_index(tuple(owners)) * own if owners else 0


def max_over_devices(value: jax.Array, *, owners: Sequence[str] = ()) -> jax.Array:
    """The largest of all devices' values inside `local`; the value itself elsewhere. Along `owners`
    devices have values of their own."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for axis in ROWS if axis in manual and axis not in owners)
    return jax.lax.pmax(value, axes) if axes else value


def _spec(
    table: Mapping[str, tuple[str, ...]],
    axes: Axes,
    shape: Sequence[int],
    sizes: Mapping[str, int],
) -> list[tuple[str, ...] | None]:
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, length in zip(axes, shape):
        name, units = _units(axis, length)
        found = () if name is None else _fitting(table[name], units, sizes, taken)
        taken.update(found)
        entries.append(found or None)
    return entries


def _units(axis: str | tuple[str, int] | None, length: int) -> tuple[str | None, int]:
    """The name of a logical axis, and how many of its units there are."""
    name, size = axis if isinstance(axis, tuple) else (axis, 1)
    return name, length // size


def _fitting(
    wanted: tuple[str, ...], length: int, sizes: Mapping[str, int], taken: set[str]
) -> tuple[str, ...]:
    """Of the wanted mesh axes, those above 1 that are free and together divide a length."""
    found: tuple[str, ...] = ()
    parts = 1
    for axis in wanted:
        size = sizes.get(axis, 1)
        if size > 1 and axis not in taken and length % (parts * size) == 0:
            found += (axis,)
            parts *= size
    return found


def _cuts(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> Cuts:
    """`parameter_spec` by who gathers what."""
    spec = parameter_spec(axes, shape, sizes)
    names = (None,) * (len(spec) - len(axes)) + tuple(axes)
    shared, kept = [], []
    for axis, (name, entry) in enumerate(zip(names, spec)):
        travel = set(SHARES).difference(OWNERS if name == "experts" else ())
        shared.append((axis, tuple(n for n in _names(entry) if n in travel)))
        kept.append((axis, tuple(n for n in _names(entry) if n not in travel)))
    some = lambda pairs: tuple(pair for pair in pairs if pair[1])
    return Cuts(some(shared), some(kept))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, which turns a single name into a string."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _local_specs(
    axes: Any, argument: Any, sizes: Mapping[str, int], chosen: dict[str, tuple[str, ...]]
) -> Any:
    """One argument's placement, leaf by leaf."""
    if isinstance(axes, Weight):
        return parameter_spec(axes.axes, axes.value.shape, sizes)
    if axes is Weight:
        own = lambda weight: parameter_spec(weight.axes, weight.value.shape, sizes)
        return jax.tree.map(own, argument, is_leaf=lambda node: isinstance(node, Weight))
    if axes is Rows:
        own = lambda path, leaf: _local_spec(Rows.AXES[path[-1].name], leaf, sizes, chosen)
        return jax.tree_util.tree_map_with_path(own, argument)
    return jax.tree.map(lambda leaf: _local_spec(axes, leaf, sizes, chosen), argument)


def _local_spec(
    axes: Axes | None, value: Any, sizes: Mapping[str, int], chosen: dict[str, tuple[str, ...]]
) -> PartitionSpec:
    """One array's placement; a logical axis has the same mesh axes in every array."""
    if axes is None:
        return PartitionSpec()
    names = []
    for axis, length in zip(axes, value.shape):
        name, units = _units(axis, length)
        if name is not None and name not in chosen:
            chosen[name] = _fitting(ACTIVATIONS[name], units, sizes, set())
        names.append(name)
    return PartitionSpec(*(name and (chosen[name] or None) for name in names))


def _sizes() -> Mapping[str, int]:
    """Sizes of the axes over which the compiler still partitions: none inside `local`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.manual_axes else dict(mesh.shape)


def _constrained(x: jax.Array, spec: Callable[[Mapping[str, int]], PartitionSpec]) -> jax.Array:
    sizes = _sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(sizes))
