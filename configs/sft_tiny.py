"""A small model learns to use a calculator from the right way through its tasks.

Command:  python train.py --config=configs/sft_tiny.py --workdir=runs/sft
Hardware: a CPU, two cores; about 250 seconds of CPU time.
Expected: held-out loss falls to 0.001 nats a learned token; of 64 held-out tasks 0.00, 0.14, 0.75
and 0.98 are solved after 100, 200, 300 and 400 steps.
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
from nemotron_jax.config.sft import SFTConfig

# A conversation takes about 140 tokens, 33 of them the model's.
STEPS, ROWS, TOKENS_PER_ROW = 400, 8, 400
STEP_TOKENS = ROWS * TOKENS_PER_ROW


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    schedule = ScheduleConfig(
        peak_learning_rate=3e-3,
        final_learning_rate=3e-5,
        warmup_tokens=30 * STEP_TOKENS,
        decay_tokens=100 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.agent(),
            training=TrainingConfig(steps=STEPS, schedule=schedule, mtp_depths=0),
            data=DataConfig(
                sources=("oracle:arithmetic/1",),
                tokenizer="train_phrases",
                sequence_length=TOKENS_PER_ROW,
                batch_size=ROWS,
            ),
            sft=SFTConfig(oracle_tasks=4000, success_tasks=64, success_tokens=32),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(evaluate_every=100, checkpoint_every=100, evaluate_rows=8),
            stage="sft",
        )
    )
