"""A run goes on, and a model speaks, on another mesh than the one it began on."""

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.model.parameters import flatten, model_shardings
from nemotron_jax.sharding import make_mesh
from tests.training.runs import changed, comparable, train

pytestmark = pytest.mark.slow  # three runs, and a model that speaks on two meshes
MESHES = [{"data": 2, "fsdp": 1}, {"data": 1, "fsdp": 4}, {"data": 1, "fsdp": 1}]


@pytest.fixture(scope="module")
def moved(finished_run, tmp_path_factory):
    """(config, directory, outcome) of the finished run, begun on two devices, gone on with four,
    and ended on one."""
    config, _, _ = finished_run
    directory = tmp_path_factory.mktemp("moved")
    for mesh, steps in zip(MESHES, (3, 6, config.training.steps), strict=True):
        part = changed(config, mesh=mesh, training={"steps": steps})
        with jax.set_mesh(make_mesh(part.mesh, jax.devices())):
            outcome = train(part, directory)
    return config, directory, outcome


def test_a_checkpoint_of_one_mesh_goes_on_on_another(moved, finished_run):
    (_, _, outcome), (_, _, whole) = moved, finished_run
    assert_same_records(outcome.records, whole.records)


def test_a_run_loads_onto_a_mesh_and_speaks_as_on_one_device(moved):
    _, directory, _ = moved
    model, mesh = nj.load_pretrained(directory), make_mesh(MeshConfig(2, 2), jax.devices())
    placed = nj.load_pretrained(directory, mesh=mesh)
    found, wanted = flatten(placed), flatten(model.split_layers())  # as decoding has them
    for name, sharding in model_shardings(placed, mesh).items():
        assert found[name].sharding.is_equivalent_to(sharding, found[name].ndim)
        np.testing.assert_array_equal(found[name], wanted[name], name)
    rows = np.random.default_rng(0).integers(16, 256, (4, 9)).tolist()
    rows[1] = rows[1][:4]
    expected = nj.generate(model, rows, 6)
    with jax.set_mesh(mesh):
        spoken = nj.generate(placed, rows, 6)
    np.testing.assert_array_equal(spoken.tokens, expected.tokens)
    np.testing.assert_allclose(spoken.logprobs, expected.logprobs, atol=1e-4)


def assert_same_records(records: list[dict], expected: list[dict]) -> None:
    for got, wanted in zip(comparable(records), comparable(expected), strict=True):
        assert got.keys() >= wanted.keys()  # a part that ends is evaluated too
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, err_msg=name)
