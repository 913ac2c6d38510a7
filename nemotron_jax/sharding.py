"""The device mesh, and how batches and parameters lie on it; mesh axis names occur here only."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemotron_jax.config.run import MeshConfig

DATA = "data"


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a run, over the first devices there are.

    Raises ValueError where there are fewer devices than the config asks for.
    """
    devices = jax.devices()
    if config.data > len(devices):
        raise ValueError(
            f"MeshConfig.data={config.data}: there are {len(devices)} devices; lower it, or on a "
            f"CPU start with XLA_FLAGS=--xla_force_host_platform_device_count={config.data}"
        )
    return jax.make_mesh(
        (config.data,), (DATA,), axis_types=(AxisType.Auto,), devices=devices[: config.data]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def sum_over_rows(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(batch, *shared)` on each device's rows of the batch, its results added up.

    What `function` sorts, routes and scans are the local rows alone.
    """
    if mesh.size == 1:
        return function

    def local(batch: Any, *shared: Any) -> Any:
        return jax.lax.psum(function(batch, *shared), DATA)

    def run(batch: Any, *shared: Any) -> Any:
        specs = (PartitionSpec(DATA), *(PartitionSpec() for _ in shared))
        # The sum makes results equal on all devices; the checker cannot see it through loops.
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return mapped(batch, *shared)

    return run


def max_over_devices(value: jax.Array) -> jax.Array:
    """The largest of all devices' values inside `sum_over_rows`; the value itself elsewhere."""
    return jax.lax.pmax(value, DATA) if _splits_rows() else value


def first_row(rows: int) -> jax.Array | int:
    """The number that this device's first of `rows` rows has among all devices' rows."""
    return jax.lax.axis_index(DATA) * rows if _splits_rows() else 0


def _splits_rows() -> bool:
    """Whether the function being traced sees one device's rows only."""
    return DATA in jax.sharding.get_abstract_mesh().manual_axes


def on_one_device(tree: Any) -> Any:
    """The first device's copy of replicated arrays, for loops of one device; copies nothing."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)
