"""A run so small that a test can take it from its first step to its last."""

import dataclasses
import random
from pathlib import Path

import numpy as np

from nemotron_jax.config.model import (
    AttentionConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from nemotron_jax.data.corpus import prepare
from nemotron_jax.data.loader import TrainLoader
from nemotron_jax.evaluation.held_out import held_out_probe
from nemotron_jax.pretrained import begin_run, data_of
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import loop
from nemotron_jax.training.prepared import prepare_run

WORDS = "def return value = ( ) : import 12 7 état 数 λ for in range list dict self".split()
SAME = ("step", "tokens", "loss", "mtp_loss", "aux_loss", "grad_norm", "learning_rate", "skipped")
ROOT = Path(__file__).parents[2]
ROWS, LENGTH, STEPS = 4, 64, 12


def write_texts(folder: Path, count: int = 30) -> Path:
    """A folder of files of random words, the same every time."""
    generator = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        words = generator.choices(WORDS, k=generator.choice([3, 20, 150, 400]))
        (folder / f"{number}.txt").write_text(f"{number} {' '.join(words)}\n", "utf-8")
    return folder


def small_model() -> ModelConfig:
    return ModelConfig(
        vocab_size=512,
        width=32,
        pattern="ME*E",
        mamba=MambaConfig(num_heads=2, head_dim=16, state_size=8, num_groups=1, chunk=16),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
        moe=MoEConfig(
            num_experts=4, experts_per_token=2, expert_width=16, shared_width=32, latent_width=16
        ),
        mtp=MTPConfig(),
        init_std=0.1,
    )


def small_run(texts: Path, **logging: int) -> RunConfig:
    """Twelve steps; checkpoints and records more often than any real run makes them."""
    step_tokens = ROWS * LENGTH
    schedule = ScheduleConfig(3e-3, 3e-5, 2 * step_tokens, 4 * step_tokens, STEPS * step_tokens)
    settings = {
        "log_every": 1,
        "evaluate_every": 6,
        "evaluate_rows": 4,
        "checkpoint_every": 3,
        "sample_tokens": 0,
    }
    return RunConfig(
        model=small_model(),
        training=TrainingConfig(steps=STEPS, schedule=schedule),
        data=DataConfig(sources=(f"hf:{texts}",), sequence_length=LENGTH, batch_size=ROWS),
        logging=LoggingConfig(**{**settings, **logging}),
    )


def changed(config: RunConfig, **parts: dict) -> RunConfig:
    """The config with fields of its parts replaced, as in changed(c, training={"steps": 3})."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in parts.items()
        },
    )


def train(config: RunConfig, workdir: Path, *, data: object = None, samples=None) -> loop.Outcome:
    """What train.py does, without its command line."""
    chunk = config.training.loss_chunk
    data_config = data_of(config.data, config.init_from, RunDirectory(workdir))
    _, corpus = prepare(data_config, config.model.vocab_size, workdir, progress=lambda line: None)
    loader = TrainLoader(corpus, config.data, config.seed, config.training.mtp_depths)
    try:
        return loop.run(
            prepare_run(config, RunDirectory(workdir)),
            data=loader if data is None else data(loader),
            probes=[held_out_probe(corpus, config.data, config.logging.evaluate_rows, chunk)],
            samples=samples,
            begin=begin_run,
        )
    finally:
        loader.close()


def comparable(records: list[dict]) -> list[dict]:
    """The parts of records that do not depend on the clock."""
    names = (*SAME, "held_out_loss", "bits_per_byte")
    return [{name: record[name] for name in names if name in record} for record in records]


def random_batch(config: RunConfig, seed: int):
    """Documents of random tokens and lengths packed into rows, with a padded end."""
    from nemotron_jax.data.packing import Row, lookahead_of, make_batch

    generator = np.random.default_rng(seed)
    depths = config.training.mtp_depths
    length = config.data.sequence_length
    rows = []
    for _ in range(config.data.batch_size):
        total = length + lookahead_of(depths)
        tokens = generator.integers(16, config.model.vocab_size, total).astype(np.int32)
        cuts = np.sort(generator.choice(np.arange(1, length), 3, replace=False))
        segments = 1 + np.searchsorted(cuts, np.arange(total), side="right").astype(np.int32)
        padding = int(generator.integers(0, length // 3))
        if padding:
            segments[length - padding :] = 0
        rows.append(Row(np.where(segments > 0, tokens, 0), segments))
    return make_batch(rows, depths)
