"""Nemotron 3 Nano, pre-training: 25 T tokens.

Command:  python train.py --config=configs/nano.py --workdir=runs/nano \
              --config.data.sources='shards:/data/pretraining'
Hardware: v6e:8x8, 64 chips, mesh fsdp=64, one row a chip in each of 48 micro-batches: 22.2 of
          32 GB a chip as compiled (docs/sharding.md), 99 s a step as estimated. Several
          processes drive it (docs/scale.md): tried with CPUs of one machine. Weights, gradients
          and moments are 505 GB.
Data:     token shards, made once: docs/data.md.
Expected: not run here. The tests build the model's shapes and pin the schedule.
Source:   Nemotron 3 Nano report, arXiv:2512.20848; the length of the decay is taken from Super.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

SCHEDULE = ScheduleConfig(
    peak_learning_rate=1e-3,
    final_learning_rate=1e-5,
    warmup_tokens=8_400_000_000,
    decay_tokens=5_000_000_000_000,
    total_tokens=25_000_000_000_000,
)


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    return to_config_dict(
        RunConfig(
            model=models.nano_30b(),
            training=TrainingConfig(
                steps=993_411, schedule=SCHEDULE, mtp_depths=0, micro_batches=48
            ),
            mesh=MeshConfig(fsdp=64),
            data=DataConfig(
                sources=("shards:/data/pretraining",),
                sequence_length=8192,
                batch_size=3072,
                held_out_fraction=0.0001,
            ),
            execution=Execution(compute_dtype="bfloat16", remat="mixers"),
            logging=LoggingConfig(evaluate_every=1000, checkpoint_every=2000, keep_checkpoints=10),
        )
    )
