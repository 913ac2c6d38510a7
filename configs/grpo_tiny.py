"""A small model that often guesses learns from rewards alone to use its calculator instead.

Command:  python train.py --config=configs/grpo_tiny.py --workdir=runs/grpo
Hardware: a CPU, two cores.
Expected: success on 512 held-out tasks rises from 0.219 to 0.748 (95 % interval of the gain: 0.48
to 0.57), on those that left-to-right gets right from 0.274 to 0.955; the other 111 stay near 0.
Most of it happens in the first six updates. docs/posttraining.md says what is learned and what not.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.rl import RLConfig, RolloutConfig
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    WarmStart,
)
from nemotron_jax.config.sft import SFTConfig

TASK = "arithmetic/1"  # two operations: products first
# An episode takes up to 100 tokens, its tool's description included.
EPISODE_TOKENS = 104

SFT_STEPS, SFT_ROWS, SFT_ROW_TOKENS = 250, 8, 400
RL_STEPS, PROMPTS, GENERATIONS = 100, 16, 8


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    rows = PROMPTS * GENERATIONS // 4
    return to_config_dict(
        RunConfig(
            model=models.agent(),
            stage="grpo",
            warm_start=warm_start(),
            sft=SFTConfig(oracle_tasks=3000),
            training=TrainingConfig(
                steps=RL_STEPS,
                mtp_depths=0,
                schedule=ScheduleConfig(
                    peak_learning_rate=5e-4,
                    final_learning_rate=5e-4,
                    warmup_tokens=0,
                    decay_tokens=0,
                    total_tokens=RL_STEPS * rows * 4 * EPISODE_TOKENS,
                ),
                optimizer=OptimizerConfig(beta2=0.999, weight_decay=0.0),
            ),
            data=DataConfig(sequence_length=4 * EPISODE_TOKENS, batch_size=rows),
            rl=RLConfig(
                rollout=RolloutConfig(
                    environments=(TASK,),
                    prompts=PROMPTS,
                    generations=GENERATIONS,
                    max_tokens=EPISODE_TOKENS,
                    max_turn_tokens=24,
                    sampler="engine",
                ),
                held_out_tasks=128,
                result_tasks=512,
                easy_slip="left_to_right",
            ),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(log_every=1, evaluate_every=25, checkpoint_every=25),
        )
    )


def warm_start() -> WarmStart:
    """Fine-tuning that leaves something to learn: most of its conversations are wrong."""
    step = SFT_ROWS * SFT_ROW_TOKENS
    return WarmStart(
        training=TrainingConfig(
            steps=SFT_STEPS,
            mtp_depths=0,
            schedule=ScheduleConfig(
                peak_learning_rate=3e-3,
                final_learning_rate=3e-4,
                warmup_tokens=20 * step,
                decay_tokens=80 * step,
                total_tokens=SFT_STEPS * step,
            ),
        ),
        data=DataConfig(
            # One conversation in five is right; most guess, the others heed no precedence.
            sources=(
                f"oracle:{TASK}",
                f"slips:{TASK}:left_to_right",
                f"slips:{TASK}:guess",
            ),
            source_weights=(0.25, 0.35, 0.4),
            tokenizer="train_phrases",
            sequence_length=SFT_ROW_TOKENS,
            batch_size=SFT_ROWS,
        ),
    )
