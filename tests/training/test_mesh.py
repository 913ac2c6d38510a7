"""A step on any mesh is the step on one device, and moves no more than a layer at once."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest

from nemotron_jax.config.model import MambaConfig, MoEConfig
from nemotron_jax.config.precision import nemotron3_nvfp4
from nemotron_jax.config.run import MeshConfig, OptimizerConfig
from nemotron_jax.data.packing import Row, make_batch
from nemotron_jax.model.parameters import flatten
from nemotron_jax.sharding import make_mesh, place_batch, target_platform
from nemotron_jax.training.losses import Objective, pretrain_objective
from nemotron_jax.training.prepared import place_state, prepare_run
from nemotron_jax.training.step import make_train_step
from tests.training.runs import changed, small_run

LENGTH = 32
DOCUMENTS = (1, 1, 9, 9, 2, 12, 1, 3, 4, 1, 32, 5, 1, 1, 7, 2)  # of each row
ONE = (1, 1)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MESHES = ((2, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # data, fsdp
VARIANTS = {
    "rows": {},
    "documents": {"aux_loss": "documents"},
    "nvfp4": {"precision": nemotron3_nvfp4(num_last_layers_high=1)},
    # Compiled in a third of the time: no last layers of another precision, and no MTP block.
    "codes": {"precision": nemotron3_nvfp4(num_last_layers_high=0)},
}
QUANTISED = ("nvfp4", "codes")
# Two ways of rounding to 4 bits, stochastically, are some 0.1 apart in each operand of a product.
EXPERTS_NOISE = 0.3
UNITS = 16  # so many that a layer is small beside the model; they compile as one
# A sum that another number of rows rounds otherwise may move a value across the border of two
# codes, and each layer behind makes more of it: after 12 units gradients are 0.3 apart.
QUANTISED_UNITS = 2
SAMPLE = [
    ((1, 4), 1, "documents"),
    ((4, 1), 1, "documents"),
    pytest.param((2, 1), 2, "codes", marks=pytest.mark.more),
]


@pytest.mark.parametrize("mesh, micro_batches, variant", SAMPLE)
def test_a_step_on_a_mesh_equals_one_device(mesh, micro_batches, variant):
    assert_same_step(mesh, micro_batches, variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rows", "documents", "nvfp4"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_on_every_mesh_equals_one_device(mesh, micro_batches, variant):
    assert_same_step(mesh, micro_batches, variant)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"data=64 times fsdp=1 is 64 devices, but there are \d"):
        make_mesh(MeshConfig(data=64), jax.devices())


def test_the_mesh_says_what_a_program_is_compiled_for():
    assert target_platform() is None
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):
        assert target_platform() == "cpu"


def test_devices_along_data_gather_nothing_and_one_device_sends_nothing():
    assert collectives((4, 1), "all-reduce") and not collectives((4, 1), "all-gather")
    assert not any(collectives(ONE, name) for name in COLLECTIVES)


def test_fsdp_divides_temporaries_and_moves_a_layer_at_once():
    whole, parts = (program(mesh, 1, "documents").memory_analysis() for mesh in ((4, 1), (1, 4)))
    assert parts.temp_size_in_bytes <= 0.5 * whole.temp_size_in_bytes
    moved = [size for name in COLLECTIVES for size in collectives((1, 4), name)]
    assert moved and max(moved) <= largest_layer()


def assert_same_step(mesh: tuple[int, int], micro_batches: int, variant: str) -> None:
    quantised = variant in QUANTISED
    # A largest magnitude is one micro-batch's, so codes depend on how many there are.
    one, expected = stepped(ONE, micro_batches if quantised else 1, variant)
    several, metrics = stepped(mesh, micro_batches, variant)
    for name, value in expected.items():
        if name.startswith(("load_", "expert_load_")):
            assert metrics[name] == value, name  # counts of tokens
        elif not (quantised and name == "grad_norm"):  # its parts are compared below
            np.testing.assert_allclose(metrics[name], value, rtol=3e-5, err_msg=name)
    # In NVFP4 blocks of an expert's weight gradient hold whichever rows share a device.
    by_device = lambda name: quantised and ".experts." in name
    for table in ("mu", "nu"):
        for name, moment in getattr(one.optimizer[1], table).items():
            gap = distance(getattr(several.optimizer[1], table)[name], moment)
            limit = EXPERTS_NOISE if by_device(name) else 4e-3 if quantised else 1e-4
            assert gap < limit, (table, name, gap)
    for name, value in flatten(one.model).items():
        got = flatten(several.model)[name]
        if name.endswith("selection_bias"):
            np.testing.assert_array_equal(got, value, name)
        elif not quantised:  # Adam's first step is a sign, which rounding turns where it is near 0
            assert distance(got, value) < 1e-3, name


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-12))


def small(mesh: tuple[int, int], micro_batches: int = 1, variant: str = "documents"):
    """A run with every kind of layer but the MLP, whose weights outweigh its activations."""
    moe = MoEConfig(
        num_experts=8, experts_per_token=2, expert_width=32, shared_width=64, latent_width=32
    )
    mamba = MambaConfig(num_heads=4, head_dim=16, state_size=8, num_groups=1, chunk=16)
    units = QUANTISED_UNITS if variant in QUANTISED else UNITS
    model = {"pattern": "ME" * units, "vocab_size": 64, "width": 64, "moe": moe, "mamba": mamba}
    return changed(
        small_run("somewhere"),
        model=model,
        mesh={"data": mesh[0], "fsdp": mesh[1]},
        execution={"remat": "full", **VARIANTS[variant]},
        training={
            "micro_batches": micro_batches,
            "mtp_depths": 0 if variant == "codes" else 1,
            "aux_loss_scale": 0.1,
            # Moments are the gradients: the norm of all is not in each one's.
            **({"optimizer": OptimizerConfig(clip_norm=1e6)} if variant in QUANTISED else {}),
        },
        data={"sequence_length": LENGTH, "batch_size": len(DOCUMENTS)},
    )


@functools.cache
def stepped(mesh: tuple[int, int], micro_batches: int, variant: str):
    """The state after the sixth step, with the first moments of the optimizer, and its metrics."""
    with jax.set_mesh(make_mesh(small(mesh).mesh, jax.devices())):
        state, batch = inputs(mesh, micro_batches, variant)
        if mesh[1] > 1:  # every matrix with a width has its part on each device
            for table in (flatten(state.model), state.optimizer[1].mu):
                whole = table["mamba.mixer.x.weight"]
                assert whole.addressable_shards[0].data.size * mesh[1] == whole.size
        return jax.device_get(program(mesh, micro_batches, variant)(state, batch))


@functools.cache
def program(mesh: tuple[int, int], micro_batches: int, variant: str):
    """The step, without optimised machine code, which changes neither memory nor traffic."""
    config = small(mesh, micro_batches, variant)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices())):
        step = make_train_step(prepare_run(config), counting(config))
        lowered = step.lower(*inputs(mesh, micro_batches, variant))
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def inputs(mesh: tuple[int, int], micro_batches: int, variant: str) -> tuple:
    config = small(mesh, micro_batches, variant)
    state, batch = place_state(prepare_run(config)), uneven_batch(config.training.mtp_depths)
    # Past the first step, whose rate is 0.
    return dataclasses.replace(state, step=state.step + 5), place_batch(batch)


def counting(config) -> Objective:
    """The pre-training objective, which reports every expert's tokens by name too."""
    inner = pretrain_objective(config.training, config.execution)

    def loss(*arguments):
        total, sums = inner.loss(*arguments)
        each = {
            f"load_{name}_{place}": load[place]
            for name, load in (sums["router_load"] | sums["mtp_router_load"]).items()
            for place in itertools.product(*map(range, load.shape))
        }
        return total, sums | each

    return Objective(inner.totals, loss)


def uneven_batch(mtp_depths: int):
    """Rows of random tokens with uneven numbers of documents; some end in padding."""
    draw, rows, length = np.random.default_rng(0), [], LENGTH + 1 + mtp_depths
    for number, count in enumerate(DOCUMENTS):
        segments = 1 + np.minimum(np.arange(length) * count // LENGTH, count - 1)
        if number % 3 == 2:
            segments[LENGTH - 5 :] = 0
        tokens = np.where(segments > 0, draw.integers(16, 64, length), 0)
        rows.append(Row(tokens.astype(np.int32), segments.astype(np.int32)))
    return make_batch(rows, mtp_depths=mtp_depths)


def collectives(mesh: tuple[int, int], name: str) -> list[int]:
    """Bytes of the results of each such collective in a mesh's step."""
    width = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
    found = re.findall(rf"= (.*?) {name}(?:-start)?\(", program(mesh, 1, "documents").as_text())
    return [
        sum(
            width[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
        )
        for result in found
    ]


def largest_layer() -> int:
    """Bytes of the largest layer's weights."""
    layers: dict[str, int] = {}
    for name, leaf in flatten(stepped(ONE, 1, "documents")[0].model).items():
        kind = name.split(".")[0]
        stacked = UNITS if kind in ("mamba", "moe") else 1
        layers[kind] = layers.get(kind, 0) + leaf.nbytes // stacked
    return max(size for kind, size in layers.items() if kind != "mtp_block")
