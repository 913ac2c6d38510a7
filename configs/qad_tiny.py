"""Quantisation-aware distillation: a model in emulated NVFP4 learns what it predicts in float32.

Command:  python train.py --config=configs/qad_tiny.py --workdir=runs/qad
Hardware: a CPU, two cores.
Expected: KL(teacher || student) of held-out text falls, `teacher_kl` in metrics.jsonl. Not measured
at this size; experiments/qad.py is a smaller one (docs/evidence.md).
The teacher is the run of configs/pretrain_tiny.py in runs/tiny; the student begins as it, with
every matmul in NVFP4. `--config.distill.teacher=DIR --config.init_from=DIR` name another.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.distill import DistillConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import ROLES, PrecisionConfig
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

STEPS, ROWS, TOKENS_PER_ROW = 100, 8, 256
STEP_TOKENS = ROWS * TOKENS_PER_ROW


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    schedule = ScheduleConfig(
        peak_learning_rate=3e-4,
        final_learning_rate=3e-5,
        warmup_tokens=10 * STEP_TOKENS,
        decay_tokens=50 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.tiny(),
            # What no teacher speaks of stays out of the loss: drafts, balance, decay.
            training=TrainingConfig(
                steps=STEPS,
                schedule=schedule,
                optimizer=OptimizerConfig(weight_decay=0.0),
                mtp_depths=0,
                aux_loss_scale=0.0,
                router_bias_rate=0.0,
            ),
            data=DataConfig(sequence_length=TOKENS_PER_ROW, batch_size=ROWS),
            execution=Execution(precision=PrecisionConfig(nvfp4_roles=ROLES)),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(evaluate_every=25, checkpoint_every=50, sample_tokens=0),
            stage="distill",
            distill=DistillConfig(teacher="runs/tiny"),
            init_from="runs/tiny",
        )
    )
