"""The tiny model on the Python standard library's source text.

Command:  python train.py --config=configs/pretrain_tiny.py --workdir=runs/tiny   (or `make train`)
Hardware: a CPU; five to eight minutes on two cores, installation and compilation included.
Expected: at the end 4.754 nats a token and 2.024 bits a byte of all held-out text; meanwhile, on 32
rows of it, 5.02 and 2.00. Samples of Python-like text.
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

STEPS, ROWS, TOKENS_PER_ROW = 400, 8, 256
STEP_TOKENS = ROWS * TOKENS_PER_ROW


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    schedule = ScheduleConfig(
        peak_learning_rate=3e-3,
        final_learning_rate=3e-5,
        warmup_tokens=40 * STEP_TOKENS,
        decay_tokens=140 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.tiny(),
            training=TrainingConfig(steps=STEPS, schedule=schedule),
            data=DataConfig(sequence_length=TOKENS_PER_ROW, batch_size=ROWS),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(evaluate_every=100, checkpoint_every=100),
        )
    )
