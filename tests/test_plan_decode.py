"""The engine's decode program, compiled for devices that are not here, moves activations alone."""

import dataclasses

import jax
import pytest

from configs import models
from nemotron_jax import compiled
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.plan import memory_of_program, part_bytes
from nemotron_jax.plan_decode import compile_decode, engine_of
from nemotron_jax.sharding import make_mesh
from pallas_kernels import absent

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
