"""How parameters lie on a mesh: by whole units, and along every axis that shares them."""

import math

import pytest
from jax.sharding import PartitionSpec

from nemotron_jax.model.parameters import abstract_model, flatten, model_axes
from nemotron_jax.sharding import parameter_spec
from tests.tiny_models import tiny_config

CUT = {"data": 2, "fsdp": 16, "expert": 8, "tensor": 1, "context": 1}


@pytest.mark.parametrize("tensor", [2, 3, 4, 8, 16])
def test_no_device_has_a_part_of_a_head_or_of_a_group(tensor):
    model = abstract_model(tiny_config("M*"))
    units = 0
    for name, axes in model_axes(model).items():
        shape = flatten(model)[name].shape
        spec = parameter_spec(axes, shape, {"tensor": tensor})
        parts = [tensor if entry else 1 for entry in spec]
        for axis, size, count in zip(axes[::-1], shape[::-1], parts[::-1]):
            if isinstance(axis, tuple):
                units += 1
                assert size % axis[1] == 0 and size // count % axis[1] == 0, (name, axis)
    assert units > 8


def test_query_heads_are_cut_where_there_are_too_few_of_keys():
    sizes = {"tensor": 4}
    assert parameter_spec(("width", ("heads", 8)), (32, 64), sizes) == PartitionSpec(None, "tensor")
    assert parameter_spec(("width", ("kv_heads", 8)), (32, 16), sizes) == PartitionSpec(None, None)
    assert parameter_spec(("width", "kv_heads"), (32, 16), sizes) != PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (("width", "latent"), (4096, 1024)),
        (("vocabulary", "width"), (131072, 4096)),
        (("experts", "latent", "expert_hidden"), (512, 1024, 2688)),
        (("experts", "expert_hidden", "latent"), (512, 2688, 1024)),
        (("mlp_hidden", "width"), (5376, 4096)),
    ],
)
def test_a_large_matrix_is_cut_by_all_devices_that_share_it(axes, shape):
    names = [
        (entry,) if isinstance(entry, str) else entry or ()
        for entry in parameter_spec(axes, shape, CUT)
    ]
    assert sorted(sum(names, ())) == ["expert", "fsdp"]
    assert math.prod(shape) % (CUT["expert"] * CUT["fsdp"]) == 0
