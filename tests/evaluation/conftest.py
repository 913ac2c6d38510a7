"""A run's directory at its first step: data of two sources, and a model that was never trained."""

import dataclasses

import pytest

from nemotron_jax.config.convert import to_json
from nemotron_jax.config.model import AttentionConfig, ModelConfig, MoEConfig
from nemotron_jax.config.run import DataConfig, RunConfig, ScheduleConfig, TrainingConfig
from nemotron_jax.data.corpus import prepare
from nemotron_jax.pretrained import load_pretrained
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.checkpoint import Checkpoints
from nemotron_jax.training.prepared import init_state, prepare_run
from tests.training.runs import write_texts

MODEL = ModelConfig(
    vocab_size=320,
    width=32,
    pattern="*E",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=16, shared_width=32),
    init_std=0.3,  # so that predictions are far from uniform
)


@pytest.fixture(scope="session")
def run_config(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    folders = [write_texts(root / name, count) for name, count in (("a", 30), ("b", 12))]
    (root / "single").mkdir()
    (root / "single" / "0.txt").write_text("one line\n" * 300 + "other lines end it\n" * 40)
    sources = tuple(f"hf:{folder}" for folder in [*folders, root / "single"])
    return RunConfig(
        model=MODEL,
        training=TrainingConfig(
            steps=1, schedule=ScheduleConfig(1e-3, 1e-3, 0, 0, 1000), mtp_depths=0, loss_chunk=50
        ),
        data=DataConfig(
            sources=sources,
            source_weights=(1.0, 1.0, 1.0),
            sequence_length=37,
            batch_size=4,
            held_out_fraction=0.3,
        ),
    )


@pytest.fixture(scope="session")
def run_directory(run_config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    tokenizer, corpus = prepare(run_config.data, 320, directory, progress=lambda line: None)
    (directory / "config.json").write_text(to_json(run_config))
    with Checkpoints(RunDirectory(directory), keep=1) as checkpoints:
        state = init_state(prepare_run(run_config))
        checkpoints.save(state, {}, {"config.json": to_json(run_config)})
        checkpoints.wait()
    return directory


@pytest.fixture(scope="session")
def corpus(run_config, run_directory):
    return prepare(run_config.data, 320, run_directory, progress=lambda line: None)[1]


@pytest.fixture(scope="session")
def model(run_directory):
    return load_pretrained(run_directory)


@pytest.fixture(scope="session")
def single_source(run_config):
    data = dataclasses.replace(
        run_config.data, sources=run_config.data.sources[:1], source_weights=(1.0,)
    )
    return dataclasses.replace(run_config, data=data)
