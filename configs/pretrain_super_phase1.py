"""Nemotron 3 Super, pre-training phase 1: 20 T tokens of the diverse mixture, in emulated NVFP4.

Command:  python train.py --config=configs/pretrain_super_phase1.py --workdir=runs/super \
              --config.data.sources='shards:/data/phase1'
Hardware: v5p:8x8x4, 256 chips, mesh data=2, fsdp=16 and expert=8: 49.8 of 95 GB a chip as compiled
          (docs/sharding.md), 49 s a step as estimated. Several processes drive it
          (docs/scale.md): tried with CPUs of one machine. Weights, gradients and moments are
          1.9 TB in float32.
Data:     token shards, made once: docs/data.md.
Expected: not run here. The tests build the model's shapes and pin the published schedule.
Source:   Nemotron 3 Super report, arXiv:2604.12374; schedule of the whole 25 T tokens, of which the
          last 5 T, the decay, are phase 2.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import nemotron3_nvfp4
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

ROWS, TOKENS_PER_ROW = 3072, 8192
SCHEDULE = ScheduleConfig(
    peak_learning_rate=4.5e-4,
    final_learning_rate=4.5e-6,
    warmup_tokens=200_000_000_000,
    decay_tokens=5_000_000_000_000,
    total_tokens=25_000_000_000_000,
)


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    return to_config_dict(
        RunConfig(
            model=models.super_120b(),
            # One row a chip in each of the micro-batches.
            training=TrainingConfig(steps=794_728, schedule=SCHEDULE, micro_batches=12),
            # Experts stay with their devices: a quarter of what fsdp=128 moves. Along the whole
            # slice fsdp would gather by all-reduces: docs/sharding.md.
            mesh=MeshConfig(data=2, fsdp=16, expert=8),
            data=DataConfig(
                sources=("shards:/data/phase1",),
                sequence_length=TOKENS_PER_ROW,
                batch_size=ROWS,
                held_out_fraction=0.0001,
            ),
            execution=Execution(
                compute_dtype="bfloat16",
                remat="mixers",
                precision=nemotron3_nvfp4(num_last_layers_high=14),
            ),
            logging=LoggingConfig(evaluate_every=1000, checkpoint_every=2000, keep_checkpoints=10),
        )
    )
