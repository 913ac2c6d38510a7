"""Every file in configs/ builds a checked run, and its model has the parameters that it should."""

import dataclasses
import importlib.util
import math
import pathlib
import re

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import models, pretrain_super_phase1, rlhf_super, rlvr_super, sft_nano, sft_super
from nemotron_jax.config.convert import from_config_dict, from_json, to_json
from nemotron_jax.config.lora import REFUSED_BY_PEFT
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.environments import registry
from nemotron_jax.model import accounting
from nemotron_jax.model.adapters import abstract_adapted, adapter_names
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.posttraining.rl_loop import check_rollouts
from pallas_kernels.absent import memory_of

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RUN_FILES = sorted(file for file in CONFIGS.glob("*.py") if file.stem != "models")
MODELS = (
    models.super_120b,
    models.nano_30b,
    models.ultra_550b,
    models.tiny,
    models.agent,
    models.speculative,
    models.kernel_tiny,
)


def built(file: pathlib.Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def abstract_leaves(config: ModelConfig) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(jax.eval_shape(lambda: Nemotron(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.stem)
def test_a_run_file_converts_strictly(file: pathlib.Path) -> None:
    config = from_config_dict(RunConfig, built(file))
    assert from_json(to_json(config)) == config
    tokens = config.training.steps * config.data.batch_size * config.data.sequence_length
    assert tokens <= config.training.schedule.total_tokens * 1.001


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.stem)
def test_a_run_file_opens_with_command_hardware_and_result(file: pathlib.Path) -> None:
    head = file.read_text().split('"""')[1]
    for word in (f"--config=configs/{file.name}", "Hardware:", "Expected:"):
        assert word in head


def test_a_full_size_run_names_a_slice_and_fits_its_state_there() -> None:
    large = 0
    for file in RUN_FILES:
        config = from_config_dict(RunConfig, built(file))
        count = accounting.parameters(config.model).total
        if count < 1e9:
            continue
        large += 1
        name, sides = re.search(r"\b(v5e|v5p|v6e|tpu7x):([\dx]+)", file.read_text())[0].split(":")
        assert math.prod(map(int, sides.split("x"))) == config.mesh.size > 1, file.stem
        # Float32: weights and, where all of them are trained, their gradient and two moments.
        words = 4 if config.training.trains == "all" else 1
        cut = config.mesh.fsdp * config.mesh.expert
        assert 4 * words * count / cut < memory_of(f"{name}:{sides}") / 2, file.stem
        rows = config.data.batch_size // config.training.micro_batches // config.mesh.row_shards
        assert rows == 1, file.stem  # a chip, in each micro-batch
    assert large == 7


@pytest.mark.parametrize("build", MODELS)
def test_the_built_model_has_the_parameters_of_the_accounting(build) -> None:
    total = sum(math.prod(leaf.shape) for leaf in abstract_leaves(build()))
    assert total == accounting.parameters(build()).total


def test_a_forgotten_tensor_would_be_noticed() -> None:
    config = models.tiny()
    without_bias = dataclasses.replace(
        config, mamba=dataclasses.replace(config.mamba, conv_bias=False)
    )
    total = sum(math.prod(leaf.shape) for leaf in abstract_leaves(without_bias))
    assert total != accounting.parameters(config).total


def test_super_runs_with_its_published_batch_and_optimizer() -> None:
    config = from_config_dict(RunConfig, pretrain_super_phase1.get_config())
    optimizer, training = config.training.optimizer, config.training
    assert config.data.batch_size * config.data.sequence_length == 25_165_824
    # 256 chips, a row each at a time; along all of a slice fsdp would gather by all-reduces.
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.expert) == (2, 16, 8)
    assert config.mesh.row_shards * training.micro_batches == config.data.batch_size
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert (training.mtp_depths, training.mtp_loss_scale) == (2, 0.3)
    assert (training.router_bias_rate, training.aux_loss_scale) == (1e-3, 1e-4)
    assert config.model.init_std == 0.014


def test_super_is_fine_tuned_with_its_published_batch_and_rate() -> None:
    config = from_config_dict(RunConfig, sft_super.get_config())
    schedule, training = config.training.schedule, config.training
    assert config.stage == "sft"  # with the tokens a step of 64 rows of 262,144
    assert config.data.batch_size * config.data.sequence_length == 64 * 262_144
    assert (schedule.peak_learning_rate, schedule.final_learning_rate) == (1e-5, 1e-5)
    assert schedule.total_tokens == 80_000_000_000
    assert abs(schedule.warmup_tokens / schedule.total_tokens - 30_000 / 7_000_000) < 1e-9
    assert (training.mtp_depths, training.mtp_loss_scale, training.trains) == (2, 0.3, "all")
    assert (config.sft.loss, config.sft.reasoning_off) == ("tokens", 0.03)


def test_nano_is_adapted_as_its_recipes_do() -> None:
    config = from_config_dict(RunConfig, sft_nano.get_config())
    assert (config.lora.rank, config.lora.alpha, config.lora.scale) == (32, 32.0, 1.0)
    assert config.training.schedule.peak_learning_rate == 1e-4
    assert {"attention", "mamba_in", "shared"} <= set(config.lora.targets)
    assert not set(REFUSED_BY_PEFT) & set(config.lora.targets)
    # Moments and gradients are those of the adapters: less than a hundredth of the model.
    model = abstract_adapted(config.model, config.lora)
    table, names = flatten(model), adapter_names(model)
    adapters = sum(math.prod(leaf.shape) for name, leaf in table.items() if name in names)
    assert 0 < adapters < sum(math.prod(leaf.shape) for leaf in table.values()) / 100


def test_super_is_reinforced_with_the_published_figures() -> None:
    """Stage one of NVIDIA's recipe for Super, and its notes on the report."""
    config = from_config_dict(RunConfig, rlvr_super.get_config())
    rl, training = config.rl, config.training
    rollout, objective = rl.rollout, rl.objective
    assert (rollout.prompts, rollout.generations) == (256, 16)
    assert config.data.batch_size == 4096 and rollout.max_tokens == 49_152
    assert 1.15e6 < training.steps * 4096 < 1.25e6  # episodes in all
    schedule = training.schedule
    assert schedule.peak_learning_rate == schedule.final_learning_rate == 3e-6
    assert schedule.warmup_tokens == 10 * config.data.batch_size * config.data.sequence_length
    optimizer = training.optimizer
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0, 1)
    assert objective.ratio == "one" and rl.updates == 1
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.28)
    assert (objective.importance_cap, objective.sequence_limit) == (5, 2)
    assert (objective.advantage_clip, objective.turn_penalty) == (50, 5)
    assert objective.kl_weight == 0 and objective.overlong == "keep"
    assert (objective.invalid_turns, objective.cut_off_calls) == ("penalise", "invalid")
    assert (rollout.temperature, rollout.low_effort, rollout.low_effort_tokens) == (1, 0.02, 3000)
    assert rl.max_age == 1 and training.freeze_routers
    assert (training.mtp_depths, training.aux_loss_scale) == (0, 0)
    assert training.router_bias_rate == 1e-3
    assert len(set(rollout.environments)) == 23 and set(rollout.environments) <= set(registry)
    check_rollouts(config)


def test_super_is_reinforced_by_comparison_with_the_published_figures() -> None:
    """Stage three of NVIDIA's recipe for Super, against stage one."""
    config = from_config_dict(RunConfig, rlhf_super.get_config())
    before = from_config_dict(RunConfig, rlvr_super.get_config())
    rollout, preference = config.rl.rollout, config.rl.preference
    assert (rollout.prompts, rollout.generations, rollout.max_turns) == (128, 16, 1)
    assert config.data.batch_size == 2048 and rollout.max_tokens == 49_152
    schedule = config.training.schedule
    assert schedule.peak_learning_rate == schedule.final_learning_rate == 1e-6
    assert schedule.warmup_tokens == 10 * config.data.batch_size * config.data.sequence_length
    weights = (preference.reasoning_weight, preference.answer_weight, preference.style_weight)
    assert weights == (0.3, 0.35, 0.05) and preference.shortest_bonus == 0.5
    assert preference.judge_format == "genrm"
    assert set(preference.environments) < set(rollout.environments) < set(registry)
    with_kl = dataclasses.replace(before.rl.objective, kl_weight=1e-4)
    assert config.rl.objective == with_kl and config.training.optimizer == before.training.optimizer
    check_rollouts(config)
