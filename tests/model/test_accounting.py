"""Accounting agrees with the published counts and with the tensors of real checkpoint files."""

import dataclasses
import math
import pathlib

import pytest
from safetensors import safe_open

from configs import models
from experiments.latent_moe import full_width_twin
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.model import accounting

PUBLIC = pathlib.Path(__file__).parents[1] / "golden" / "public"
SETS = sorted(path.name for path in PUBLIC.iterdir() if path.is_dir())


def checkpoint_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with safe_open(PUBLIC / name / "checkpoint" / "model.safetensors", "numpy") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


@pytest.mark.parametrize(
    ("build", "main", "mtp", "tensors"),
    [
        (models.super_120b, 120_668_707_840, 2_942_325_248, (41_643, 1_040)),
        (models.nano_30b, 31_577_940_288, 0, (6_243, 0)),
        (models.ultra_550b, 549_308_993_536, 11_215_610_368, (49_983, 1_040)),
    ],
)
def test_published_models_have_their_published_counts(build, main, mtp, tensors) -> None:
    count = accounting.parameters(build())
    assert (count.main, count.mtp) == (main, mtp) and count.total == main + mtp
    assert accounting.hub_tensor_counts(build()) == tensors


def test_active_parameters_of_the_published_models() -> None:
    config = models.super_120b()
    active = accounting.active_parameters
    assert round(active(config) / 1e9, 2) == 12.77
    assert round(active(config, embedding=False) / 1e9, 2) == 12.23
    assert round(active(config, embedding=False, head=False) / 1e9, 2) == 11.70
    assert round(active(models.nano_30b()) / 1e9, 2) == 3.58
    assert round(active(models.ultra_550b(), embedding=False) / 1e9) == 55


@pytest.mark.parametrize("name", SETS)
def test_counts_equal_those_of_a_checkpoint_file(name: str) -> None:
    shapes = checkpoint_shapes(name)
    config = ModelConfig.from_hf(PUBLIC / name / "checkpoint")
    mtp = {key: shape for key, shape in shapes.items() if key.startswith("mtp.")}
    count = accounting.parameters(config)
    assert count.mtp == sum(map(math.prod, mtp.values()))
    assert count.total == sum(map(math.prod, shapes.values()))
    assert accounting.hub_tensor_counts(config) == (len(shapes) - len(mtp), len(mtp))


@pytest.mark.parametrize(
    ("name", "depths"), [*((name, 0) for name in SETS), ("hybrid_moe_latent", 2)]
)
def test_weight_flops_are_twice_the_matrices_that_a_token_meets(name: str, depths: int) -> None:
    config = ModelConfig.from_hf(PUBLIC / name / "checkpoint")
    expected = 0.0
    for key, shape in checkpoint_shapes(name).items():
        if len(shape) == 1 or key == "backbone.embeddings.weight":
            continue
        times = depths if key.startswith("mtp.") else 1
        times = 1 + depths if key == "lm_head.weight" else times
        if ".experts." in key:
            times *= config.moe.experts_per_token / config.moe.num_experts
        expected += 2 * times * math.prod(shape)
    flops = accounting.forward_flops(config, 7, mtp_depths=depths)
    assert flops.weights == pytest.approx(expected, rel=1e-12)


def test_attention_and_scan_flops_by_counting_multiplications() -> None:
    config = ModelConfig.from_hf(PUBLIC / "hybrid_moe_latent" / "checkpoint")
    queries, state = 4 * 24, 8 * 12 * 16
    context = 11
    flops = accounting.forward_flops(config, context)
    assert flops.attention == context * (2 * queries + 2 * queries)  # one attention layer
    assert flops.scan == 3 * (3 * state + 2 * state + 2 * 8 * 12)  # three Mamba layers
    assert accounting.forward_flops(config, context, mtp_depths=2).attention == 3 * flops.attention


@pytest.mark.parametrize("length", [1, 6, 7])
def test_training_flops_are_three_forward_passes_of_a_whole_row(length: int) -> None:
    config = models.tiny()
    row = sum(
        accounting.forward_flops(config, position, mtp_depths=2).total
        for position in range(1, length + 1)
    )
    assert length * accounting.training_flops(config, length, mtp_depths=2).total == 3 * row


def test_super_decode_state_matches_the_shapes_of_its_caches() -> None:
    state = accounting.decode_state(models.super_120b(), 262_144)
    assert state.kv == 8 * 2 * 2 * 128 * 262_144 * 2
    assert state.ssm == 40 * 128 * 64 * 128 * 4
    assert state.conv == 40 * 3 * 10_240 * 2
    assert state.mtp_kv == 2 * 2 * 128 * 262_144 * 2
    assert state.total == state.kv + state.ssm + state.conv + state.mtp_kv
    narrow = accounting.decode_state(models.super_120b(), 262_144, kv_dtype="float8_e4m3fn")
    assert 2 * narrow.kv == state.kv and narrow.ssm == state.ssm
    assert accounting.decode_state(models.super_120b(), 0).kv == 0


def test_latent_experts_cost_what_a_quarter_of_full_width_ones_cost() -> None:
    latent = models.super_120b()
    twin = full_width_twin(latent)
    assert (twin.moe.num_experts, twin.moe.experts_per_token) == (128, 6)
    for context in (1, 8192):
        full = accounting.forward_flops(twin, context).total
        assert accounting.forward_flops(latent, context).total == pytest.approx(full, rel=0.05)
    assert accounting.parameters(latent).total == pytest.approx(
        accounting.parameters(twin).total, rel=0.05
    )


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mtp_depths=1"):
        accounting.forward_flops(models.nano_30b(), 8, mtp_depths=1)
    with pytest.raises(ValueError, match="kv_dtype='int3'"):
        accounting.decode_state(models.tiny(), 8, kv_dtype="int3")


def test_biases_and_parts_are_counted() -> None:
    config = models.tiny()
    biased = dataclasses.replace(
        config,
        mamba=dataclasses.replace(config.mamba, conv_bias=False, projection_bias=True),
        moe=dataclasses.replace(config.moe, projection_bias=True),
    )
    inner, channels = config.mamba.inner_width, config.mamba.conv_channels
    mamba_change = inner + channels + config.mamba.num_heads + config.width - channels
    moe_change = config.moe.shared_width + config.moe.latent_width + 2 * config.width
    before, after = accounting.parameters(config), accounting.parameters(biased)
    assert after.mamba - before.mamba == 3 * mamba_change
    assert after.moe - before.moe == 3 * moe_change
    assert after.mtp - before.mtp == moe_change
