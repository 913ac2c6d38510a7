"""What a loss keeps for its backward pass: no whole matrix on a mesh, and less with remat."""

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
from nemotron_jax.training.prepared import abstract_state, prepare_run
from tests.training.runs import changed, small_run

DEVICES, LENGTH, DEPTHS = 4, 8, 2
# Matrices as large as embedding and head, which outweigh what a few tokens leave.
MOE = MoEConfig(
    num_experts=4, experts_per_token=2, expert_width=256, shared_width=32, latent_width=16
)


@pytest.mark.parametrize("remat", ["mixers", "full"])
def test_no_device_keeps_a_whole_matrix_or_its_gradient(remat):
    kept, table = residuals(remat, DEPTHS, DEVICES)
    # What each of the devices holds of a residual is a part of a larger array.
    matrices = ("head.weight", "embedding", "mtp_block.blocks.1.mixer.experts.up")
    least = DEVICES * min(table[name].size for name in matrices)
    assert kept and max(kept) < least


def test_the_mtp_block_follows_remat():
    kept = lambda remat, depths: sum(residuals(remat, depths, length=256)[0])
    none, full = (kept(remat, 1) - kept(remat, 0) for remat in ("none", "full"))
    assert full < 0.7 * none  # what is left is mostly the loss of the depth itself


def residuals(
    remat: str, mtp_depths: int, devices: int = 1, length: int = LENGTH
) -> tuple[list[int], dict]:
    """Numbers in each array that a loss keeps for its backward pass, and the parameters."""
    config = changed(
        small_run("somewhere"),
        model={"vocab_size": 512, "moe": MOE},
        mesh={"data": 1, "fsdp": devices},
        execution={"remat": remat},
        training={"mtp_depths": mtp_depths},
        data={"sequence_length": length, "batch_size": devices},
    )
    tokens = jnp.arange(length + 1 + mtp_depths, dtype=jnp.int32)
    batch = make_batch([Row(tokens, jnp.ones_like(tokens))] * devices, mtp_depths=mtp_depths)
    objective = pretrain_objective(config.training, config.execution)
    mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices())
    model = abstract_state(prepare_run(config), mesh).model

    def backward(parameters):
        def loss(parameters):
            model_of = unflatten(model, parameters)
            return objective.loss(model_of, batch, objective.totals(batch), None)[0]

        return jax.vjp(loss, parameters)[1]

    table = flatten(model)
    with jax.set_mesh(mesh):
        kept = jax.tree.leaves(jax.eval_shape(backward, table))
    return [math.prod(leaf.shape) for leaf in kept], table
