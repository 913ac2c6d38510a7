"""What the engine's decode program holds and moves, compiled for devices that are not here."""

import dataclasses
import math
import re

import jax
import pytest

from configs import models
from nemotron_jax import compiled
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.plan_decode import compile_decode, engine_of
from nemotron_jax.planning.targets import memory_of_program, part_bytes
from nemotron_jax.sharding import make_mesh
from pallas_kernels import absent
from tests.tiny_models import tiny_config

ROWS, CONTEXT = 64, 32_768


@pytest.mark.prove_tpu
def test_two_units_of_super_decode_with_weights_that_stay() -> None:
    """At Super's sizes on 16 chips: collectives, temporaries and kernels."""
    config = dataclasses.replace(models.super_120b(), pattern="MEM*E")
    mesh = make_mesh(MeshConfig(data=2, tensor=8), absent.tpu_devices("v5p:2x2x4"))
    program, model, store = compile_decode(config, mesh, engine_of(ROWS, CONTEXT))
    text = program.as_text()
    found = compiled.collectives(text)
    moved = sum(one.count * one.bytes for one in found)
    # Twenty times this is a Super's 40 units, at most 0.25 GB; a layer's weights are far larger.
    assert 0 < moved < 0.25e9 / 20 and max(one.bytes for one in found) <= 4e6
    # Each device has one head of the pool, whose pages all devices along `data` hold.
    pool = store.pools[3]
    assert part_bytes(pool) == pool.size * 2 // 8
    temporaries, total = memory_of_program(program, "v5p:2x2x4")
    assert temporaries < part_bytes(pool) / 4 and total < 95e9
    for kernel in ("grouped_matmul", "ragged_paged_attention"):
        assert kernel in text, kernel
    # Whole experts lie on all sixteen chips.
    [experts] = jax.tree.leaves(model.moe[0].mixer.experts.up)
    assert experts.sharding.shard_shape(experts.shape) == (512 // 16, 1024, 2688)


@pytest.mark.more
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tensor=2, expert=2)], ids=["1", "4"])
def test_a_packed_decode_program_has_no_floats_of_all_experts(mesh: MeshConfig) -> None:
    """Of 32 experts one device's own are made one after the other: no array of the optimised
    program, inside its loops and fusions too, has half as many elements as they have weights."""
    sizes = {"num_experts": 32, "latent_width": 128, "expert_width": 192, "shared_width": 64}
    config = tiny_config("E")
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **sizes))
    place = make_mesh(mesh, jax.devices()[: mesh.size])
    own = 32 // mesh.size * 128 * 192
    for experts, most in (("nvfp4", own // 2), ("dense", own)):
        program, *_ = compile_decode(config, place, engine_of(4, 64), experts)
        shapes = {shape for one in compiled.instructions(program.as_text()) for shape in of(one)}
        largest = max(map(math.prod, shapes))
        assert largest < most if experts == "nvfp4" else largest >= most
        temporaries, _ = memory_of_program(program, "cpu:8")
        assert experts == "dense" or temporaries < 2 * own, temporaries  # of bfloat16


def of(one: compiled.Reached) -> list[tuple[int, ...]]:
    """The shapes of an instruction's arrays."""
    found = re.findall(r"\[([\d,]+)\]", one.type)
    return [tuple(map(int, shape.split(","))) for shape in found]
