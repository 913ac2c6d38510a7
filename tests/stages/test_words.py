"""A run says first what it does, and a finished one last what to do next."""

import dataclasses

from configs import grpo_tiny, pretrain_tiny
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.stages.words import closing, opening


def test_a_run_says_what_it_does_and_then_what_to_do_next(tmp_path) -> None:
    config = from_config_dict(RunConfig, pretrain_tiny.get_config())
    directory = RunDirectory(tmp_path)
    first = opening(config, directory)
    assert first.startswith("pretrain: 2.92 million parameters, 400 steps of up to 2,048 tokens;")
    assert str(tmp_path) in first and closing(config, directory) == ""
    directory.checkpoint(100).mkdir(parents=True)
    assert "tokens, 100 of them done;" in opening(config, directory)
    assert closing(config, directory) == ""  # stopped there
    directory.checkpoint(400).mkdir()
    assert f"python eval.py --checkpoint={tmp_path} " in closing(config, directory)


def test_what_was_rewarded_is_the_part_that_is_talked_to(tmp_path) -> None:
    config = from_config_dict(RunConfig, grpo_tiny.get_config())
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=7))
    assert opening(config, RunDirectory(tmp_path)).startswith("grpo: 553,568 parameters, 7 steps")
    RunDirectory(tmp_path / "grpo").checkpoint(7).mkdir(parents=True)
    assert f"chat --checkpoint={tmp_path / 'grpo'} " in closing(config, RunDirectory(tmp_path))
