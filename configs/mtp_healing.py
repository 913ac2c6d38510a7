"""The MTP block trained alone, the rest of the model frozen.

Command:  python train.py --config=configs/mtp_healing.py --workdir=runs/healed \
              --config.init_from=runs/speculative
Hardware: a CPU, two cores; a step is cheaper than one of configs/speculative_tiny.py.
Expected: drafts are accepted more often, the model's own predictions are the same bit for bit. Not
measured.
Reinforcement learning freezes the MTP block while the model moves away from it; this is the step
after it. `--config.data.sources` should name the text that the model now writes, or
`--config.objective.text=own` lets it write; with `--config.objective.mtp=kl` the block learns what
the model predicts in place of the tokens themselves (docs/posttraining.md, boosting).
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
        peak_learning_rate=1e-3,
        final_learning_rate=1e-5,
        warmup_tokens=10 * STEP_TOKENS,
        decay_tokens=100 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.speculative(),
            training=TrainingConfig(
                steps=STEPS, schedule=schedule, mtp_loss_scale=1.0, trains="mtp"
            ),
            data=DataConfig(sequence_length=TOKENS_PER_ROW, batch_size=ROWS),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(evaluate_every=50, checkpoint_every=100, sample_tokens=0),
            init_from="runs/speculative",
        )
    )
