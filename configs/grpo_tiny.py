"""A small model that often guesses learns from rewards alone to use its calculator instead.

Command:  python train.py --config=configs/grpo_tiny.py --workdir=runs/grpo
Hardware: a CPU, two cores.
Expected: success on 512 held-out tasks rises from 0.111 to 0.934 (95 % interval of the gain: 0.79
to 0.86), most of it in the first 25 updates; about 700 seconds of CPU time, fine-tuning included.
docs/posttraining.md says what is learned and what not.
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

SFT_STEPS, SFT_ROWS, SFT_ROW_TOKENS = 1000, 8, 400
RL_STEPS, PROMPTS, GENERATIONS = 60, 16, 8


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    rows = PROMPTS * GENERATIONS // 4
    return to_config_dict(
        RunConfig(
            model=models.agent(),
            stage="grpo",
            warm_start=warm_start(),
            sft=SFTConfig(oracle_tasks=8000),
            training=TrainingConfig(
                steps=RL_STEPS,
                mtp_depths=0,
                schedule=ScheduleConfig(
                    peak_learning_rate=3e-4,
                    final_learning_rate=3e-4,
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
            logging=LoggingConfig(log_every=1, evaluate_every=20, checkpoint_every=20),
        )
    )


def warm_start() -> WarmStart:
    """Fine-tuning that leaves something to learn: nine of ten conversations guess, and wrongly."""
    step = SFT_ROWS * SFT_ROW_TOKENS
    return WarmStart(
        training=TrainingConfig(
            steps=SFT_STEPS,
            mtp_depths=0,
            schedule=ScheduleConfig(
                peak_learning_rate=3e-3,
                final_learning_rate=3e-4,
                warmup_tokens=20 * step,
                decay_tokens=200 * step,
                total_tokens=SFT_STEPS * step,
            ),
        ),
        data=DataConfig(
            # Weights share out tokens: the right way has 18 % of them and 10 % of conversations.
            sources=(f"oracle:{TASK}", f"slips:{TASK}:guess"),
            source_weights=(0.18, 0.82),
            tokenizer="train_phrases",
            sequence_length=SFT_ROW_TOKENS,
            batch_size=SFT_ROWS,
        ),
    )
