"""Dataclass, ConfigDict, command line and JSON carry the same configuration, strictly checked."""

import dataclasses
import json
import math
import pathlib
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import models, pretrain_tiny
from nemotron_jax.config import convert
from nemotron_jax.config.convert import from_config_dict, from_json, to_config_dict, to_json
from nemotron_jax.config.model import MLPConfig, ModelConfig
from nemotron_jax.config.run import DataConfig, RunConfig, ScheduleConfig, TrainingConfig

RUN_FILE = """
from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.run import RunConfig, ScheduleConfig, TrainingConfig

def get_config():
    schedule = ScheduleConfig(1e-3, 1e-5, 100, 200, 1000)
    training = TrainingConfig(steps=5, schedule=schedule, mtp_depths=0)
    return to_config_dict(RunConfig(model=models.nano_30b(), training=training))
"""


def run_config(model: ModelConfig | None = None) -> RunConfig:
    model = model or models.tiny()
    schedule = ScheduleConfig(1e-3, 1e-5, 100, 200, 1000)
    depths = 2 if model.mtp else 0
    data = DataConfig(sources=("python_stdlib", "hf:x"), source_weights=(1.0, 2.5))
    return RunConfig(
        model=model,
        training=TrainingConfig(steps=5, schedule=schedule, mtp_depths=depths),
        data=data,
    )


@pytest.fixture
def parsed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """The run that absl's own flags make of a config file and command-line overrides."""
    (tmp_path / "run_file.py").write_text(RUN_FILE)

    def parse(*overrides: str) -> RunConfig:
        arguments = ["train.py", f"--config={tmp_path / 'run_file.py'}", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)  # config_flags looks for overrides there
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(arguments)
        return from_config_dict(RunConfig, values.config)

    return parse


@pytest.mark.parametrize("build", [models.super_120b, models.nano_30b, models.tiny])
def test_config_dict_and_json_keep_every_field(build) -> None:
    config = run_config(build())
    assert from_config_dict(RunConfig, to_config_dict(config)) == config
    assert from_config_dict(RunConfig, to_config_dict(config).to_dict()) == config
    assert from_config_dict(RunConfig, dataclasses.asdict(config)) == config
    assert from_json(to_json(config)) == config


def test_json_is_strict_and_keeps_an_infinity() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(to_json(run_config()), parse_constant=refuse)
    assert values["format_version"] == convert.FORMAT_VERSION
    assert values["model"]["mamba"]["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert from_json(to_json(run_config())).model.mamba.time_step_limit == (0.0, math.inf)


def test_an_int_serves_as_a_number_and_a_list_as_a_tuple() -> None:
    values = to_config_dict(run_config()).to_dict()
    values["training"]["optimizer"]["clip_norm"] = 2
    values["data"] |= {"sources": ["a"], "source_weights": [3]}
    config = from_config_dict(RunConfig, values)
    assert config.training.optimizer.clip_norm == 2.0
    assert type(config.training.optimizer.clip_norm) is float
    assert config.data.source_weights == (3.0,) and config.data.sources == ("a",)


def test_absent_keys_take_defaults() -> None:
    values = {"steps": 3, "schedule": dataclasses.asdict(run_config().training.schedule)}
    assert from_config_dict(TrainingConfig, values).mtp_loss_scale == 0.3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.moe.num_expert", 8, r"RunConfig.model.moe.num_expert: unknown.*'num_experts'"),
        ("trainign", 8, r"RunConfig.trainign: unknown.*'training'"),
        ("zzz", 8, "RunConfig.zzz: unknown key"),
        ("model.width", "128", "RunConfig.model.width='128': must be an integer"),
        ("model.width", True, "RunConfig.model.width=True"),
        ("model.width", 128.0, "RunConfig.model.width=128.0"),
        ("model.width", None, "RunConfig.model.width=None"),
        ("model.mamba.conv_bias", 1, "conv_bias=1: must be true or false"),
        ("model.norm_epsilon", True, "norm_epsilon=True: must be a number"),
        ("model.norm_epsilon", "1e-5", "norm_epsilon='1e-5'"),
        ("model.pattern", 3, "pattern=3: must be a string"),
        ("model.mamba", 3, "RunConfig.model.mamba=3: must be a dictionary"),
        ("model.mamba.time_step_limit", (0.0, 1.0, 2.0), "must have 2 entries"),
        ("data.sources", "hf:x", "sources='hf:x': must be a tuple"),
        ("data.sources", (1, "a"), r"RunConfig.data.sources\[0\]=1"),
        ("data.batch_size", 0, "DataConfig.batch_size=0"),
        ("model.mamba", None, "ModelConfig.mamba=None"),
    ],
)
def test_a_bad_entry_is_named_with_its_path(path: str, value: object, message: str) -> None:
    values = dataclasses.asdict(run_config())
    *parents, last = path.split(".")
    part = values
    for name in parents:
        part = part[name]
    part[last] = value
    with pytest.raises(ValueError, match=message):
        from_config_dict(RunConfig, values)
    with pytest.raises(ValueError, match=message):
        from_config_dict(RunConfig, ConfigDict(values))


@pytest.mark.parametrize("wrong", [0, -3])
@pytest.mark.parametrize("name", ["training.steps", "data.batch_size", "data.sequence_length"])
def test_a_wrong_number_is_named_and_not_the_schedule_that_follows_it(
    name: str, wrong: int
) -> None:
    values = pretrain_tiny.get_config()
    part, field = name.split(".")
    values[part][field] = wrong
    with pytest.raises(ValueError, match=rf"^\w+Config\.{field}={wrong}: must be at least 1$"):
        from_config_dict(RunConfig, values)


def test_a_missing_required_key_is_named() -> None:
    values = dataclasses.asdict(run_config())
    del values["training"]["schedule"]["total_tokens"]
    with pytest.raises(ValueError, match="RunConfig.training.schedule.total_tokens: is required"):
        from_config_dict(RunConfig, values)


def test_flags_override_numbers_tuples_and_absent_scalars(parsed) -> None:
    config = parsed(
        "--config.model.moe.num_experts=8",
        "--config.model.moe.latent_width=64",
        "--config.training.steps=10",
        "--config.training.schedule.peak_learning_rate=2",
        "--config.data.sources=('hf:a', 'hf:b')",
        "--config.data.source_weights=1,2.5",
        "--config.model.mamba.conv_bias=false",
        "--config.seed=7",
    )
    assert config.model.moe.num_experts == 8 and config.model.moe.latent_width == 64
    assert config.training.steps == 10 and config.training.schedule.peak_learning_rate == 2.0
    assert config.data.sources == ("hf:a", "hf:b") and config.data.source_weights == (1.0, 2.5)
    assert not config.model.mamba.conv_bias and config.seed == 7
    assert config.model.mtp is None and config.model.mlp is None


def test_flags_fill_an_absent_part(parsed) -> None:
    config = parsed("--config.model.mlp={'width': 64}", "--config.model.mtp={'pattern': '*E'}")
    assert config.model.mlp == MLPConfig(width=64) and config.model.mtp.pattern == "*E"


def test_flags_replace_one_source_by_one(parsed) -> None:
    assert parsed("--config.data.sources=hf:/data/web.jsonl").data.sources == (
        "hf:/data/web.jsonl",
    )


def test_flags_refuse_unknown_keys_and_ill_typed_values(parsed) -> None:
    with pytest.raises(AttributeError, match="num_experts"):
        parsed("--config.model.moe.num_expert=8")
    with pytest.raises(flags.IllegalFlagValueError, match="steps"):
        parsed("--config.training.steps=abc")
    with pytest.raises(ValueError, match="MoEConfig.experts_per_token"):
        parsed("--config.model.moe.num_experts=2")


@pytest.mark.parametrize("version", [None, "1", True, 0, convert.FORMAT_VERSION + 1])
def test_an_unknown_format_version_is_refused(version: object) -> None:
    values = json.loads(to_json(run_config()))
    values["format_version"] = version
    with pytest.raises(ValueError, match="RunConfig.format_version"):
        from_json(json.dumps(values))


def test_an_older_file_passes_every_migration_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(old: str, new: str):
        return lambda values: {new if key == old else key: value for key, value in values.items()}

    monkeypatch.setattr(convert, "FORMAT_VERSION", 3)
    monkeypatch.setattr(
        convert, "MIGRATIONS", {1: rename("rng", "random"), 2: rename("random", "seed")}
    )
    values = json.loads(to_json(run_config()))
    values["format_version"] = 1
    values["rng"] = values.pop("seed") + 5
    assert from_json(json.dumps(values)).seed == 5


def test_every_format_version_has_its_migration() -> None:
    assert sorted(convert.MIGRATIONS) == list(range(1, convert.FORMAT_VERSION))


def test_the_first_version_named_where_largest_magnitudes_are_taken() -> None:
    values = {"execution": {"precision": {"nvfp4": {"amax": "global", "hadamard": True}}}}
    kept = convert.MIGRATIONS[1](values)
    assert kept == {"execution": {"precision": {"nvfp4": {"hadamard": True}}}}


@pytest.mark.parametrize("rewards", ["earned", "permuted"])
def test_a_control_of_an_older_version_is_refused_and_other_runs_are_read(rewards: str) -> None:
    values = json.loads(to_json(run_config()))
    values["rl"]["rollout"]["rewards"] = rewards
    text = json.dumps(values | {"format_version": 2})
    if rewards == "earned":
        assert from_json(text) == run_config()
    else:
        with pytest.raises(ValueError, match=r"rewards='permuted': a control is an arm of"):
            from_json(text)
