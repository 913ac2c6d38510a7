"""A small model that knows the form of ten environments' answers learns from rewards to be right.

Command:  python train.py --config=configs/grpo_multi.py --workdir=runs/grpo_multi
Hardware: a CPU, two cores.
Expected: docs/posttraining.md has what was measured, by environment. Tasks that the fine-tuned
model always solves are dropped, the others come from easy to hard; result.json and
plots/result.png report each environment with its interval.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.model import ModelConfig
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

ENVIRONMENTS = (
    "arithmetic/0",
    "lookup/0",
    "structured_json/0",
    "tool_choice/0",
    "multiple_choice/0",
    "inverse_instructions/0",
    "retention/0",
    "preference/0",
    "refusal/0",
    "over_refusal/0",
)
# A right episode takes up to 71 tokens.
EPISODE_TOKENS, EPISODES_PER_ROW = 88, 4
SFT_STEPS, SFT_ROWS, SFT_ROW_TOKENS = 560, 8, 480
RL_STEPS, PROMPTS, GENERATIONS = 80, 20, 8
RIGHT, WRONG = 0.7, 0.3  # shares of conversations that are right, and of another task's answers


def model() -> ModelConfig:
    """The agent with a vocabulary for ten environments' phrases.

    Not for all of them: names and numbers stay pieces, which are copied alike everywhere.
    """
    small = models.agent()
    return ModelConfig(**{**vars(small), "vocab_size": 2048})


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    rows = PROMPTS * GENERATIONS // EPISODES_PER_ROW
    return to_config_dict(
        RunConfig(
            model=model(),
            stage="grpo",
            warm_start=warm_start(),
            sft=SFTConfig(oracle_tasks=1000, bad_rows="drop"),
            training=TrainingConfig(
                steps=RL_STEPS,
                mtp_depths=0,
                schedule=ScheduleConfig(
                    peak_learning_rate=3e-4,
                    final_learning_rate=3e-4,
                    warmup_tokens=0,
                    decay_tokens=0,
                    total_tokens=RL_STEPS * rows * EPISODES_PER_ROW * EPISODE_TOKENS,
                ),
                optimizer=OptimizerConfig(beta2=0.999, weight_decay=0.0),
            ),
            data=DataConfig(sequence_length=EPISODES_PER_ROW * EPISODE_TOKENS, batch_size=rows),
            rl=RLConfig(
                rollout=RolloutConfig(
                    environments=ENVIRONMENTS,
                    prompts=PROMPTS,
                    generations=GENERATIONS,
                    max_tokens=EPISODE_TOKENS,
                    max_turn_tokens=32,
                ),
                pool_tasks=96,
                pool_samples=3,
                held_out_tasks=16,
                result_tasks=128,
            ),
            mesh=MeshConfig(data=2),
            logging=LoggingConfig(log_every=1, evaluate_every=20, checkpoint_every=20),
        )
    )


def warm_start() -> WarmStart:
    """Fine-tuning that leaves something to learn: three conversations in ten are wrong."""
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
            sources=(
                *(f"oracle:{name}" for name in ENVIRONMENTS),
                *(f"slips:{name}:other" for name in ENVIRONMENTS),
            ),
            source_weights=(*[RIGHT] * len(ENVIRONMENTS), *[WRONG] * len(ENVIRONMENTS)),
            tokenizer="train_phrases",
            sequence_length=SFT_ROW_TOKENS,
            batch_size=SFT_ROWS,
        ),
    )
