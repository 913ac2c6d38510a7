"""A model loaded onto a mesh is the model, and a host holds its own devices' parts alone."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import nemotron_jax as nj
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.evaluation.facts import parameters_sha256
from nemotron_jax.interop import parts
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model.parameters import flatten, mesh_of, model_shardings
from nemotron_jax.sharding import make_mesh
from tests.golden_cases import GOLDEN, model


@pytest.mark.parametrize("case", ["hybrid_moe_latent", "dense"])
def test_a_hub_model_is_born_on_a_mesh(case, monkeypatch):
    mesh, allocated = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()), []
    expected = flatten(model(case))
    allocate = parts._allocate
    count = lambda *options: allocated.append(allocate(*options)) or allocated[-1]
    monkeypatch.setattr(parts, "_allocate", count)
    loaded = nj.load_pretrained(GOLDEN / case / "checkpoint", mesh=mesh, layout="training")
    placed = model_shardings(loaded, mesh)
    assert any(sharding.spec != PartitionSpec() for sharding in placed.values())
    for name, leaf in flatten(loaded).items():
        np.testing.assert_array_equal(leaf, expected[name], name)
        assert leaf.sharding == placed[name], name
    # Devices along `data` hold the same parts, whose memory they share.
    assert sum(a.nbytes for a in allocated) == sum(leaf.nbytes for leaf in expected.values())
    assert max(a.nbytes for a in allocated) < max(leaf.nbytes for leaf in expected.values())


class OneHost(NamedSharding):
    """A placement of which this host has the first devices alone."""

    def addressable_devices_indices_map(self, shape):
        places = super().addressable_devices_indices_map(shape)
        return dict(itertools.islice(places.items(), 2))


def test_a_host_reads_what_its_devices_hold(monkeypatch):
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices())
    few = lambda model, mesh: {
        name: OneHost(mesh, sharding.spec)
        for name, sharding in model_shardings(model, mesh).items()
    }
    read, held = [], {}
    monkeypatch.setattr("nemotron_jax.interop.hf_import.model_shardings", few)
    whole = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda f, name: read.append(name) or whole(f, name)
    )
    keep = lambda into: held.setdefault(len(held), into) and len(held)
    monkeypatch.setattr(parts.Destination, "array", keep)
    checkpoint = GOLDEN / "hybrid_moe_latent" / "checkpoint"
    loaded = nj.load_pretrained(checkpoint, mesh=mesh, layout="training")
    expected = flatten(model("hybrid_moe_latent"))
    experts = loaded.config.moe.num_experts
    # The first two of four devices hold the first half of the experts.
    numbers = {
        int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name
    }
    assert numbers == set(range(experts // 2))
    for name, number in flatten(loaded).items():
        into = held[number - 1]
        for part in into._parts.values():
            where = tuple(slice(s, s + n) for s, n in zip(part.starts, part.values.shape))
            np.testing.assert_array_equal(part.values, expected[name][where], name)


def test_a_model_for_decoding_takes_its_matrices_one_at_a_time(monkeypatch):
    """Single layers whose weights stay on their devices; a host holds what its devices lack yet."""
    checkpoint, expected = GOLDEN / "hybrid_moe_latent" / "checkpoint", model("hybrid_moe_latent")
    held, most = [], []

    def allocate(shape, dtype):
        held.append(np.zeros(shape, dtype))
        most.append(sum(array.nbytes for array in held))
        return held[-1]

    def handed_over(into):
        arrays = [part.values for part in into._parts.values()]
        held[:] = [mine for mine in held if all(mine is not array for array in arrays)]
        return whole(into)

    whole = parts.Destination.array
    monkeypatch.setattr(parts, "_allocate", allocate)
    monkeypatch.setattr(parts.Destination, "array", handed_over)
    loaded = nj.load_pretrained(checkpoint, mesh=MeshConfig(data=2, tensor=2))
    matrices = {name: leaf.nbytes for name, leaf in flatten(loaded).items()}
    # A fused projection, which the hub holds in one piece, is the largest matrix here.
    fused = sum(matrices[f"mamba.0.mixer.{name}.weight"] for name in ("z", "x", "b", "c", "dt"))
    assert not held and max(matrices.values()) < max(most) <= fused < sum(matrices.values()) / 8
    assert loaded.is_split and parameters_sha256(loaded) == parameters_sha256(expected)
    for name, sharding in model_shardings(loaded, mesh_of(loaded)).items():
        assert flatten(loaded)[name].sharding == sharding, name
    # Whole experts are on all devices, and nothing that a product would gather is cut.
    experts = loaded.moe[0].mixer.experts.up[...].sharding.spec
    assert experts == PartitionSpec(("tensor", "data"), None, None)
    assert loaded.mamba[0].mixer.out.weight[...].sharding.spec == PartitionSpec("tensor", None)
