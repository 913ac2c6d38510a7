"""Losses, loads and every gradient of a step on crossings of the mesh's axes are one device's."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nemotron_jax.config.model import AttentionConfig, MambaConfig, MLPConfig, MoEConfig
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.sharding import make_mesh, place_batch
from nemotron_jax.training.losses import pretrain_objective
from nemotron_jax.training.prepared import place_state, prepare_run
from nemotron_jax.training.step import _gradients
from tests.tiny_models import quick_jit
from tests.training.runs import changed, small_run
from tests.training.test_mesh import DOCUMENTS, LENGTH, uneven_batch

LIMIT = 2e-6  # float32 sums made in another order
# A head's own numbers gather every token and channel, in terms of both signs: what is left of them
# may be far smaller than they are, and so its error is larger beside it. They are judged beside a
# hundredth of what the matrix of those channels gathers, where they are less, and beside what one
# device misses itself by when it sums over micro-batches: on a mesh the terms differ too.
HEAD_SUMS, TERMS, TIMES = ("A_log", ".D", "dt_bias"), 0.01, 4
# data, fsdp, expert and tensor
MESHES = ((2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 8), (4, 1, 2), (1, 4, 2))
TENSOR_MESHES = ((1, 1, 1, 2), (1, 1, 1, 4), (2, 1, 2, 2))
SAMPLE = [((2, 2, 2), 2, "documents", "E")]
CROSSINGS = [
    pytest.param(mesh, micro_batches, sequences, "M*E", marks=pytest.mark.more)
    for mesh in MESHES
    for micro_batches in (1, 2)
    for sequences in ("rows", "documents")
]
CROSSINGS += [
    pytest.param(mesh, micro_batches, "documents", "M*-E", marks=pytest.mark.more)
    for micro_batches, mesh in zip((1, 2, 1), TENSOR_MESHES)
]


@pytest.mark.parametrize("mesh, micro_batches, sequences, pattern", SAMPLE + CROSSINGS)
def test_gradients_on_a_mesh_equal_one_device(mesh, micro_batches, sequences, pattern):
    expected, sums = gradients((1, 1, 1, 1), 1, sequences, pattern)
    got, own_sums = gradients(mesh, micro_batches, sequences, pattern)
    for name, value in sums.items():
        if name.endswith("router_load"):
            jax.tree.map(np.testing.assert_array_equal, own_sums[name], value)
        else:
            np.testing.assert_allclose(own_sums[name], value, rtol=LIMIT, err_msg=name)
    for name, value in expected.items():
        most = LIMIT * (np.linalg.norm(value) + 1e-12)
        if name.endswith(HEAD_SUMS):
            channels = expected[name.rpartition(".")[0] + ".x.weight"]
            most = max(most, LIMIT * TERMS * np.linalg.norm(channels))
        gap = np.linalg.norm(got[name] - value)
        if gap >= most and name.endswith(HEAD_SUMS):
            most = TIMES * own_gap(name, sequences, pattern)
        assert gap < most, (name, gap, most)


def own_gap(name: str, sequences: str, pattern: str) -> float:
    """How far one device is from its own gradient when it sums over two or four micro-batches."""
    one, two, four = (gradients((1, 1, 1, 1), n, sequences, pattern)[0][name] for n in (1, 2, 4))
    return max(np.linalg.norm(two - one), np.linalg.norm(four - one))


@pytest.mark.parametrize(
    ("mesh", "rows", "sentence"),
    [
        (
            {"expert": 3},
            3,
            r"RunConfig.model.moe.num_experts=8: must be a multiple of mesh.expert=3",
        ),
        ({"expert": 2, "fsdp": 2}, 6, r"data.batch_size=6: must be .* the 4 devices of .*expert=2"),
        ({"tensor": 3}, 4, r"num_experts=8: must be a multiple of .* mesh.tensor=3"),
        ({"tensor": 8}, 4, r"attention.num_heads=4: must be a multiple of mesh.tensor=8"),
        ({"tensor": 4}, 4, r"mamba.num_groups=2: must be a multiple of mesh.tensor=4"),
        ({"context": 2}, 4, "MeshConfig.context=2: must be 1"),
        ({"expert": 0}, 4, "MeshConfig.expert=0"),
    ],
)
def test_a_mesh_that_divides_nothing_is_one_sentence(mesh, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        changed(small((1, 1, 1)), mesh=mesh, data={"batch_size": rows})


def test_devices_along_data_fsdp_and_expert_share_rows():
    mesh = MeshConfig(data=2, fsdp=3, expert=5)
    assert (mesh.row_shards, mesh.size) == (30, 30)
    assert mesh.named == "data=2 times fsdp=3 times expert=5"


def small(
    mesh: tuple[int, ...], micro_batches: int = 1, sequences: str = "rows", pattern: str = "E"
) -> RunConfig:
    """A run of one unit; of a pattern with attention, with an MTP block too."""
    moe = MoEConfig(
        num_experts=8, experts_per_token=2, expert_width=16, shared_width=32, latent_width=16
    )
    groups = 4 if "-" in pattern else 2
    model = {
        "pattern": pattern,
        "vocab_size": 64,
        "moe": moe,
        # Groups that tensor=4 divides, and key/value heads that it exceeds.
        "mamba": MambaConfig(num_heads=4, head_dim=8, state_size=8, num_groups=groups, chunk=16),
        "mlp": MLPConfig(width=32) if "-" in pattern else None,
        "attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    }
    return changed(
        small_run("somewhere"),
        model=model,
        mesh=dict(zip(("data", "fsdp", "expert", "tensor"), mesh)),
        # A scan, as on a pod, whose models have too many layers to be unrolled.
        execution={"aux_loss": sequences, "layers": "scan"},
        training={
            "micro_batches": micro_batches,
            "mtp_depths": 1 if "*" in pattern else 0,
            "aux_loss_scale": 0.1,
        },
        data={"sequence_length": LENGTH, "batch_size": len(DOCUMENTS)},
    )


@functools.cache
def gradients(
    mesh: tuple[int, ...], micro_batches: int, sequences: str, pattern: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every gradient of a step by name, and its sums."""
    config = small(mesh, micro_batches, sequences, pattern)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices())):
        run = prepare_run(config)
        state = place_state(run)
        state = dataclasses.replace(state, step=state.step + 5)
        batch = place_batch(uneven_batch(config.training.mtp_depths))
        objective = pretrain_objective(config.training, config.execution)
        step = quick_jit(lambda state, batch: _gradients(state, batch, run, objective))
        return jax.device_get(step(state, batch))
