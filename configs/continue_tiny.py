"""The tiny model trained on from weights it already has.

Command:  python train.py --config=configs/continue_tiny.py --workdir=runs/continued \
              --config.init_from=runs/tiny
Hardware: a CPU; about half the time of configs/pretrain_tiny.py.
Expected: held-out loss starts where the first run ended. Not measured.
`init_from` takes a hub's directory too, in a config of your own whose model is
`ModelConfig.from_hf(DIRECTORY)`. The tokenizer is that directory's own; the optimizer and the
schedule begin anew.
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

STEPS, ROWS, TOKENS_PER_ROW = 200, 8, 256
STEP_TOKENS = ROWS * TOKENS_PER_ROW


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    schedule = ScheduleConfig(
        peak_learning_rate=1e-3,  # a third of the first run's: its moments are lost
        final_learning_rate=1e-5,
        warmup_tokens=20 * STEP_TOKENS,
        decay_tokens=140 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.tiny(),
            training=TrainingConfig(steps=STEPS, schedule=schedule),
            data=DataConfig(sequence_length=TOKENS_PER_ROW, batch_size=ROWS),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(evaluate_every=50, checkpoint_every=100),
            init_from="runs/tiny",
        )
    )
