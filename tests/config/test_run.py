"""A bad run fails when it is built, with the field, the value and the rule in the message."""

import dataclasses
import math

import pytest

from configs import models
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from nemotron_jax.config.rl import PreferenceConfig, RLConfig, RolloutConfig
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

SCHEDULE = ScheduleConfig(1e-3, 1e-5, 100, 200, 1000)
VALID = {
    ScheduleConfig: dataclasses.asdict(SCHEDULE),
    TrainingConfig: {"steps": 5, "schedule": SCHEDULE},
    RunConfig: {
        "model": models.tiny(),
        "training": TrainingConfig(steps=5, schedule=SCHEDULE),
    },
    MambaConfig: {"num_heads": 8, "head_dim": 4, "state_size": 4, "num_groups": 2},
    AttentionConfig: {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
    MoEConfig: {"num_experts": 8, "experts_per_token": 2, "expert_width": 4, "shared_width": 4},
    MLPConfig: {"width": 4},
    ModelConfig: {"vocab_size": 64, "width": 8, "pattern": "-", "mlp": MLPConfig(width=4)},
}


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (DataConfig, {"sequence_length": 0}, "sequence_length=0"),
        (DataConfig, {"sources": ()}, "sources"),
        (RolloutConfig, {"generations": 1}, "generations=1: must be at least 2"),
        (RolloutConfig, {"max_tokens": 1}, "max_tokens=1: must be at least 2"),
        (RolloutConfig, {"slots": 10**8}, "slots=100000000: must be at most 65,536"),
        (RolloutConfig, {"workers": 10**6}, "workers=1000000: must be at most 4,096"),
        (RolloutConfig, {"timeout_s": 1e300}, "timeout_s=1e.300: must be at most 604,800"),
        (RolloutConfig, {"temperature": 1e-9}, "temperature=1e-09: must be 0, .* or lie between"),
        (RolloutConfig, {"temperature": 1e9}, "temperature=1000000000.0: must .* lie between"),
        *(
            (PreferenceConfig, {"judge": address}, "judge=.* the address of a server")
            for address in (
                *("http://", "https://", "http:///v1", "http://:8000/v1", "http://host:port/v1"),
                *("http://host:99999/v1", "http://host:0", "http://[::1/v1", "http://a b/v1"),
                *("http://host/\u00e9", "http://h\n/v1", "ftp://host", "host:8000", "rule"),
            )
        ),
        (PreferenceConfig, {"judge_timeout_s": 1e300}, "judge_timeout_s=1e.300"),
        (PreferenceConfig, {"judge_calls": 10**9}, "judge_calls=1000000000: must be at most"),
        *(
            (RLConfig, {name: 10**12}, f"{name}=1000000000000: must be at most 1,000,000")
            for name in ("held_out_tasks", "result_tasks", "pool_tasks", "pool_samples")
        ),
        (DataConfig, {"source_weights": (1.0, 1.0)}, "source_weights"),
        (DataConfig, {"source_weights": (-1.0,)}, "source_weights"),
        (DataConfig, {"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2=1.0"),
        (OptimizerConfig, {"clip_norm": 0.0}, "clip_norm=0.0"),
        (ScheduleConfig, {"final_learning_rate": 1.0}, "final_learning_rate=1.0.*0.001"),
        (ScheduleConfig, {"peak_learning_rate": 0.0}, "peak_learning_rate=0.0"),
        (ScheduleConfig, {"total_tokens": 299}, "total_tokens=299.*warmup_tokens=100"),
        (ScheduleConfig, {"warmup_tokens": -1}, "warmup_tokens=-1"),
        (TrainingConfig, {"steps": 0}, "steps=0"),
        (TrainingConfig, {"mtp_depths": -1}, "mtp_depths=-1"),
        (TrainingConfig, {"mtp_loss_scale": -0.1}, "mtp_loss_scale=-0.1"),
        (LoggingConfig, {"log_every": 0}, "log_every=0"),
        (LoggingConfig, {"merge_window": -1}, "merge_window=-1"),
        (Execution, {"remat": "some"}, "remat='some'.*full"),
        (Execution, {"kernels": "triton"}, "kernels='triton'"),
        (Execution, {"kernels": "auto,softmax=xla"}, "kernels='auto,softmax=xla'.*ssd_scan"),
        (Execution, {"kernels": "ssd_scan=triton"}, "kernels='ssd_scan=triton'.*pallas_tpu"),
        (RunConfig, {"stage": "dream"}, "stage='dream'"),
        (
            RunConfig,
            {"data": DataConfig(batch_size=3), "micro": 2},
            "batch_size=3.*micro_batches=2",
        ),
        (RunConfig, {"model": models.nano_30b()}, "mtp_depths=2.*model.mtp"),
        (MambaConfig, {"num_heads": 7}, "num_heads=7.*num_groups=2"),
        (MambaConfig, {"time_step_limit": (1.0, 0.5)}, "time_step_limit"),
        (MambaConfig, {"time_step_min": 0.5}, "time_step_min=0.5"),
        (AttentionConfig, {"num_heads": 5}, "num_heads=5"),
        (MoEConfig, {"experts_per_token": 9}, "experts_per_token=9"),
        (MoEConfig, {"num_expert_groups": 4, "experts_per_token": 3}, "at most 2"),
        (MoEConfig, {"latent_width": 0}, "latent_width=0"),
        (MLPConfig, {"width": 0}, "width=0"),
        (MTPConfig, {"pattern": "M"}, "pattern='M'"),
        (ScheduleConfig, {"peak_learning_rate": math.inf}, "peak_learning_rate=inf.*finite"),
        (OptimizerConfig, {"weight_decay": math.nan}, "weight_decay=nan"),
        (DataConfig, {"source_weights": (math.inf,)}, "source_weights"),
        (TrainingConfig, {"steps": 2.5}, "steps=2.5.*integer"),
        (TrainingConfig, {"steps": True}, "steps=True.*integer"),
        (MeshConfig, {"data": "2"}, "data='2'.*integer"),
        (RunConfig, {"seed": -1}, "seed=-1.*0 to 4294967295"),
        (RunConfig, {"seed": 2**32}, "seed=4294967296"),
        (MambaConfig, {"time_step_limit": (math.nan, 1.0)}, "time_step_limit"),
        (MambaConfig, {"time_step_limit": 0.5}, "time_step_limit=0.5"),
        (MoEConfig, {"weight_scale": 0.0}, "weight_scale=0.0"),
        (ModelConfig, {"init_std": 0.0}, "init_std=0.0.*positive"),
        (ModelConfig, {"norm_epsilon": -1e-5}, "norm_epsilon=-1e-05.*positive"),
        (ModelConfig, {"eos_token": 64}, "eos_token=64.*vocab_size=64"),
        (ModelConfig, {"bos_token": 99}, "bos_token=99.*vocab_size=64"),
        (ModelConfig, {"pad_token": -1}, "pad_token=-1"),
    ],
)
def test_a_bad_value_is_named_when_the_config_is_built(cls, change: dict, message: str) -> None:
    arguments = dict(VALID.get(cls, {})) | change
    if micro := arguments.pop("micro", None):
        arguments["training"] = dataclasses.replace(arguments["training"], micro_batches=micro)
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{message}"):
        cls(**arguments)


def test_adapters_that_learn_from_rewards_have_no_dropout() -> None:
    training = TrainingConfig(steps=5, schedule=SCHEDULE, trains="lora")
    run = lambda stage, dropout: RunConfig(
        models.tiny(), training, stage=stage, lora=LoRAConfig(dropout=dropout)
    )
    assert run("sft", 0.1) and run("grpo", 0.0)
    with pytest.raises(ValueError, match=r"LoRAConfig\.dropout=0\.1: must be 0 in stage grpo"):
        run("grpo", 0.1)


def test_a_pattern_needs_the_parts_that_it_uses() -> None:
    with pytest.raises(ValueError, match="ModelConfig.attention=None.*'\\*'"):
        dataclasses.replace(models.tiny(), attention=None)
    with pytest.raises(ValueError, match="pattern='MQ'"):
        dataclasses.replace(models.tiny(), pattern="MQ")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "rules",
        "http://host:8000/v1",
        "https://10.0.0.1/v1/",
        "http://[::1]:8000/v1",
        "http://a_b",
    ],
)
def test_a_judges_address_has_a_host(address) -> None:
    assert PreferenceConfig(judge=address).judge == address


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.tiny().width = 3


def test_a_kernel_is_chosen_for_every_op_or_for_one():
    assert Execution().kernel("attention") == "auto"
    mixed = Execution(kernels="ssd_scan=xla,reference")
    assert (mixed.kernel("attention"), mixed.kernel("ssd_scan")) == ("reference", "xla")
