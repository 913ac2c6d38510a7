"""The device mesh, and how every array lies on it; mesh axis names occur here only.

Arrays are global. Dense parts of the model are partitioned by the compiler, from the placement of
parameters and batches and from `shard`; what sorts, scans or calls a kernel runs in `local`, where
each device sees its own part alone.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
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
    # Of weights that stay where they are, see `staying`.
    "whole_width": (),
    "whole_hidden": (),
    "own_latent": ("tensor",),
    "own_experts": (*OWNERS, "data", "fsdp", "context"),
}
# What takes these names' place where no product gathers anything.
STAYING = {"width": "whole_width", "latent": "own_latent"}
STAYING |= {"experts": "own_experts", "expert_hidden": "whole_hidden"}
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
    processes = len({device.process_index for device in devices})
    if processes > 1 and config.size < len(devices):
        raise ValueError(
            f"MeshConfig: {config.named} is {config.size} devices, and the {processes} processes "
            f"have {len(devices)} together; a mesh of several processes takes all: change an axis"
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


def staying(axes: Axes) -> Axes:
    """The axes of a weight that stays where it is, as in decoding: activations travel to it.

    Experts spread over all devices, and what `tensor` does not cut every device has whole.
    """
    names = STAYING | ({"latent": "whole_hidden"} if "experts" in axes else {})  # no expert is cut
    return tuple(names.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)


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


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """The mesh entered; nothing without one. A program is compiled anew for another mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def target_platform() -> str | None:
    """The platform of the mesh at hand, as pallas_kernels calls it: what a program is compiled for.

    None without a mesh, and where the mesh says only that it is some GPU's.
    """
    platform = getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", None)
    return platform if platform in ("cpu", "tpu") else None


def is_local() -> bool:
    """Whether arrays are one device's own here, as inside `local`: kernels of a device can run."""
    return math.prod(axis_sizes().values()) == 1


def own_rows(mesh: Mesh, count: int) -> list[int]:
    """Which rows of a batch of `count` this process's devices hold, ascending.

    That is the mesh's to say, not the process's number: of two processes whose devices share rows
    along `tensor` both hold the same.
    """
    places = _by_rows(mesh, count).addressable_devices_indices_map((count,)).values()
    return sorted({row for (rows,) in places for row in range(*rows.indices(count))})


def place_batch(batch: Any, count: int | None = None) -> Any:
    """The rows of a batch as global arrays, split by rows over the mesh.

    Every process gives all rows, or where there are `count` of them its `own_rows` alone. Without a
    mesh the batch stays as it is.
    """
    mesh = current_mesh()
    if mesh is None:
        return batch

    def place(rows: Any) -> jax.Array:
        length = len(rows) if count is None else count
        sharding = _by_rows(mesh, length)
        if isinstance(rows, jax.Array):
            return jax.device_put(rows, sharding)
        held = range(length) if count is None else own_rows(mesh, count)
        at = {row: place for place, row in enumerate(held)}

        def part(index: tuple[slice, ...]) -> Any:
            first, last, _ = index[0].indices(length)
            return rows[at[first] : at[last - 1] + 1] if last > first else rows[:0]

        return jax.make_array_from_callback((length, *rows.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def on_every_device(values: Any) -> Any:
    """Results of a program whole on every device, so that each process can read them."""
    return jax.tree.map(lambda value: constrained(value, lambda _: PartitionSpec()), values)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, an activation with these logical axes, laid out as the table says."""
    return constrained(x, lambda sizes: activation_spec(axes, x.shape, sizes))


def shard_parameter(x: jax.Array, axes: Axes) -> jax.Array:
    """`x` laid out as a parameter with these logical axes: its gradient, or a copy of it."""
    return constrained(x, lambda sizes: parameter_spec(axes, x.shape, sizes))


def part_shape(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """What each device holds of a parameter with these logical axes, on the mesh at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = axis_sizes()
    if not sizes:
        return tuple(shape)
    return NamedSharding(mesh, parameter_spec(axes, shape, sizes)).shard_shape(tuple(shape))


def local(
    function: Callable[..., Any], in_axes: Sequence[Any], out_axes: Any
) -> Callable[..., Any]:
    """`function` on each device's own part of its arguments; the function itself without a mesh.

    Arguments and results are pytrees. `in_axes` hold for each argument the logical axes of its
    arrays, activations all, leading ones first (None: whole everywhere); a `Weight`, whose value it
    is; or the class `Weight`, for `Packed` too, or `Rows`, of which it is made and which bring
    their own. `out_axes` are the results', leading axes likewise; a result that has one entry for
    each device's part names it "batch". Rows that the devices do not divide are computed by all of
    them. Differentiate it from outside only.
    """
    sizes = axis_sizes()
    if math.prod(sizes.values()) == 1:
        return function

    def run(*arguments: Any) -> Any:
        chosen: dict[str, tuple[str, ...]] = {}  # mesh axes by logical axis, found once
        specs = [
            _local_specs(axes, argument, sizes, chosen)
            for axes, argument in zip(in_axes, arguments, strict=True)
        ]
        cut = lambda axis: chosen.get(_units(axis, 0)[0]) or None
        results = jax.tree.map(
            lambda axes: PartitionSpec(*map(cut, axes)), out_axes, is_leaf=_is_axes
        )
        mapped = jax.shard_map(function, in_specs=tuple(specs), out_specs=results, check_vma=False)
        return mapped(*arguments)

    return run


def on_owners(function: Callable[[jax.Array], Any], x: jax.Array, owned: Axes) -> Any:
    """`function` on each device's own part of `x`, which is cut along one axis; the function itself
    without a mesh.

    `owned` are logical axes of a parameter, of the last axes of `x`; the first names one, and the
    others are None. Results have the axes of `x` up to that one, and are cut likewise.
    """
    sizes = axis_sizes()
    if math.prod(sizes.values()) == 1:
        return function(x)
    spec = PartitionSpec(*parameter_spec(owned, x.shape, sizes)[: x.ndim - len(owned) + 1])
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


def parts(name: str, units: int) -> int:
    """Parts that devices cut a logical axis of an activation into, one of so many units."""
    sizes = axis_sizes()
    return math.prod(sizes[axis] for axis in _fitting(ACTIVATIONS[name], units, sizes, set()))


def row_axes(rows: int) -> tuple[str, ...]:
    """The mesh axes along which devices share a batch of so many rows, inside `local`."""
    return _fitting(ACTIVATIONS["batch"], rows, axis_sizes(), set())


def _by_rows(mesh: Mesh, count: int) -> NamedSharding:
    """How the first axis of a batch of `count` rows lies on a mesh."""
    return NamedSharding(mesh, activation_spec(("batch",), (count,), mesh.shape))


def _spec(
    table: Mapping[str, tuple[str, ...]], axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]
) -> list[tuple[str, ...] | None]:
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, length in zip(axes, shape):
        name, units = _units(axis, length)
        found = () if name is None else _fitting(table[name], units, sizes, taken)
        taken.update(found)
        entries.append(found or None)
    return entries


def _is_axes(node: Any) -> bool:
    """Whether a node of `out_axes` is one result's axes: names, or names with their units."""
    has_unit = lambda axis: isinstance(axis, tuple) and len(axis) == 2 and isinstance(axis[1], int)
    is_axis = lambda axis: isinstance(axis, str | None) or has_unit(axis)
    return isinstance(node, tuple) and all(map(is_axis, node))


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


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, which turns a single name into a string."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _local_specs(
    axes: Any, argument: Any, sizes: Mapping[str, int], chosen: dict[str, tuple[str, ...]]
) -> Any:
    """One argument's placement, leaf by leaf."""
    if isinstance(axes, Weight):
        return parameter_spec(axes.axes, axes.value.shape, sizes)
    if axes is Weight:
        kinds = (Weight, Packed)
        own = lambda weight: _weight_specs(weight, sizes)
        return jax.tree.map(own, argument, is_leaf=lambda node: isinstance(node, kinds))
    if axes is Rows:
        own = lambda path, leaf: _local_spec(Rows.AXES[path[-1].name], leaf, sizes, chosen)
        return jax.tree_util.tree_map_with_path(own, argument)
    return jax.tree.map(lambda leaf: _local_spec(axes, leaf, sizes, chosen), argument)


def _weight_specs(weight: Weight | Packed, sizes: Mapping[str, int]) -> Any:
    if isinstance(weight, Weight):
        spec = parameter_spec(weight.axes, weight.value.shape, sizes)
        # Codes are there where whole experts are cut alone.
        codes = jax.tree.map(lambda leaf: PartitionSpec(*spec[:1]), weight.codes)
        return dataclasses.replace(weight, value=spec, codes=codes)
    # Every array of the codes, the vector of factors too, is cut by experts as the words are.
    own = lambda leaf: PartitionSpec(*_spec(PARAMETERS, weight.axes(leaf), leaf.shape, sizes))
    return jax.tree.map(own, weight)


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


def axis_sizes() -> Mapping[str, int]:
    """Sizes of the axes over which the compiler still partitions: none inside `local`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.manual_axes else dict(mesh.shape)


def constrained(x: jax.Array, spec: Callable[[Mapping[str, int]], PartitionSpec]) -> jax.Array:
    """`x` laid out as `spec` says for axes of these sizes; as it is on one device."""
    sizes = axis_sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(sizes))
