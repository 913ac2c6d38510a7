"""What a loss keeps for its backward pass on a mesh: nothing of which every device holds all."""

import math

import jax
import jax.numpy as jnp
import pytest

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.data.packing import Row, make_batch
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.sharding import make_mesh
from nemotron_jax.training.losses import pretrain_objective
from nemotron_jax.training.state import abstract_state
from tests.training.runs import changed, small_run

DEVICES, LENGTH, DEPTHS = 4, 8, 2
# Matrices as large as embedding and head, which outweigh what a few tokens leave.
MOE = MoEConfig(
    num_experts=4, experts_per_token=2, expert_width=256, shared_width=32, latent_width=16
)


@pytest.mark.parametrize("remat", ["mixers", "full"])
def test_no_device_keeps_a_whole_matrix_or_its_gradient(remat):
    config = changed(
        small_run("somewhere"),
        model={"vocab_size": 512, "moe": MOE},
        mesh={"data": 1, "fsdp": DEVICES},
        execution={"remat": remat},
        training={"mtp_depths": DEPTHS},
        data={"sequence_length": LENGTH, "batch_size": DEVICES},
    )
    tokens = jnp.arange(LENGTH + 1 + DEPTHS, dtype=jnp.int32)
    batch = make_batch([Row(tokens, jnp.ones_like(tokens))] * DEVICES, mtp_depths=DEPTHS)
    objective = pretrain_objective(config)
    mesh = make_mesh(MeshConfig(fsdp=DEVICES), jax.devices())
    model = abstract_state(config, mesh).model

    def backward(parameters):
        def loss(parameters):
            model_of = unflatten(model, parameters)
            return objective.loss(model_of, batch, objective.totals(batch), None)[0]

        return jax.vjp(loss, parameters)[1]

    table = flatten(model)
    with jax.set_mesh(mesh):
        kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, table))]
    # What each of the devices holds of a residual is a part of a larger array.
    matrices = ("head.weight", "embedding", "mtp_block.blocks.1.mixer.experts.up")
    least = DEVICES * min(table[name].size for name in matrices)
    assert kept and max(map(math.prod, kept)) < least
