"""A tokenizer of the tiny agent's tasks, and its config: fixtures that several folders share."""

import dataclasses

import pytest

from configs import grpo_tiny
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.conversations import prepare_conversations
from nemotron_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def grpo_config() -> RunConfig:
    return from_config_dict(RunConfig, grpo_tiny.get_config())


@pytest.fixture(scope="session")
def phrases(grpo_config, tmp_path_factory) -> Tokenizer:
    """The tokenizer that the tiny agent's fine-tuning makes, of fewer conversations."""
    few = dataclasses.replace(grpo_config.sft, oracle_tasks=40)
    folder = tmp_path_factory.mktemp("phrases")
    data, size = grpo_config.warm_start.data, grpo_config.model.vocab_size
    return prepare_conversations(data, few, size, folder, progress=lambda line: None)[0]
