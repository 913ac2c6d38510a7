"""A deep, narrow model with an MTP block that pays: speculation on a CPU.

Command:  python train.py --config=configs/speculative_tiny.py --workdir=runs/speculative
Hardware: a CPU; about 14 minutes on two cores, by the pace of a first hundred steps.
Expected: 2.73 nats a token and 1.95 bits a byte of held-out text; drafts that give 2.9 tokens a
verification there at k = 5, 3.0 in text sampled at temperature 1 (docs/performance.md).
Eight of its 22 layers are dense and its experts few, so that a step of one token reads nearly
the weights that a step of four reads, as in a large model on an accelerator.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

STEPS, ROWS, TOKENS_PER_ROW = 600, 8, 256
STEP_TOKENS = ROWS * TOKENS_PER_ROW


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    schedule = ScheduleConfig(
        peak_learning_rate=2e-3,
        final_learning_rate=2e-5,
        warmup_tokens=40 * STEP_TOKENS,
        decay_tokens=210 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.speculative(),
            training=TrainingConfig(steps=STEPS, schedule=schedule, mtp_loss_scale=0.5),
            data=DataConfig(sequence_length=TOKENS_PER_ROW, batch_size=ROWS),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(evaluate_every=150, checkpoint_every=150, sample_tokens=64),
        )
    )
