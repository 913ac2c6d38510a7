"""The reference of the configuration says of every field what its dataclass says."""

import dataclasses
import json

import pytest

from nemotron_jax.config import __main__ as command
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.reference import parts
from nemotron_jax.config.run import RunConfig
from tests.door_config import get_config

FIELDS = {field.path: field for part in parts(RunConfig) for field in part.fields}


def leaves(config, path="config") -> set[str]:
    """Dotted names of the values of a run, as --config. flags set them."""
    found = set()
    for name, value in config.items():
        inside = hasattr(value, "items")
        found |= leaves(value, f"{path}.{name}") if inside else {f"{path}.{name}"}
    return found


def test_every_flag_of_a_run_is_in_it() -> None:
    missing = leaves(get_config()) - FIELDS.keys()
    optional = {f"config.{part}" for part in ("lora", "warm_start", "model.mlp", "model.mtp")}
    assert missing <= optional
    assert {f"config.lora.{name}" for name in to_config_dict(LoRAConfig())} <= FIELDS.keys()


def test_a_field_has_type_default_unit_rules_and_meaning() -> None:
    size = FIELDS["config.data.batch_size"]
    assert (size.type, size.default, size.unit) == ("int", "8", "rows")
    assert size.rules[0] == "an integer of at least 1"
    assert "multiple of training.micro_batches" in size.rules[1]  # a rule of the run around it
    assert size.meaning == "rows of one optimizer step"
    assert FIELDS["config.stage"].rules == ("one of pretrain, sft, grpo, distill",)
    assert not FIELDS["config.model.width"].default
    (engine, _) = parts(EngineConfig, "engine")
    assert any(field.rules == ("an integer of at least 1",) for field in engine.fields)


def test_numbers_have_rules() -> None:
    free = {"config.training.schedule.peak_learning_rate"}
    numbers = {path for path, field in FIELDS.items() if field.type in ("int", "float")}
    assert not {path for path in numbers - free if not FIELDS[path].rules}


def test_the_command_prints_tables_or_json(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["data.batch_size", "config.mesh"]) == 0
    out = capsys.readouterr().out
    assert "| `batch_size` | int | `8` | rows |" in out and "## config.mesh" in out
    assert "prefetch" not in out
    assert command.main(["--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown) == len(parts(RunConfig)) + len(parts(EngineConfig))
    assert {field.name for field in dataclasses.fields(EngineConfig)} > {"slots"}
    assert command.main(["no_such"]) == 2
    assert "config: no_such: no field" in capsys.readouterr().err
