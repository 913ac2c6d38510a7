"""Nemotron 3 Super, reinforcement learning from verified rewards in many environments at once.

Command:  python train.py --config=configs/rlvr_super.py --workdir=runs/rlvr_super
          The second half of training: --config.rl.rollout.max_tokens=65536
              --config.data.sequence_length=65536 --config.rl.rollout.low_effort=0.01,
              with mathematics and science alone in rl.rollout.low_effort_environments.
          Preferences come after it: configs/rlhf_super.py.
Hardware: v5p:8x8x4 is what the mesh is for, 256 chips, data=2 and fsdp=128: weights, gradients and
          moments take 15.5 of 95 GB a chip. Reinforcement learning runs in one process on one host
          so far, so this run does not start on a pod yet; neither its rollouts nor its step were
          compiled at this size. 820 s a step as estimated, 431 of them for the episodes, were all
          of full length and no weight gathered to play them.
Expected: not run here. The tests pin its figures to the published ones. Before its first step
          pool_tasks has every one of 4,096 tasks of 23 environments played four times: 377,000
          episodes, against 1.2 million in all of training.
Source:   stage1_rlvr of NVIDIA's recipe for Super (NVIDIA-NeMo/Nemotron, NeMo RL branch super-v3);
          the number of steps follows from 1.2 million episodes, as NVIDIA's launch said. The
          warm-up begins at a rate of 0, theirs at 3e-7.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import ObjectiveConfig, RLConfig, RolloutConfig
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

PROMPTS, GENERATIONS, EPISODE_TOKENS = 256, 16, 49_152
EPISODES = PROMPTS * GENERATIONS
STEPS, WARMUP_STEPS = 293, 10

# What stands here for the 21 environments of the release: see docs/environments.md.
ENVIRONMENTS = (
    "arithmetic",
    "bug_repair",
    "calendar",
    "code_tests",
    "command_equivalence",
    "equational_proof",
    "equations",
    "graph_walk",
    "instruction_following",
    "inverse_instructions",
    "multiple_choice",
    "needle",
    "over_refusal",
    "python_tool",
    "refusal",
    "retention",
    "science_units",
    "search_pivot",
    "structured_json",
    "terminal",
    "tool_choice",
    "tool_schema",
    "workplace",
)


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    step_tokens = EPISODES * EPISODE_TOKENS
    return to_config_dict(
        RunConfig(
            model=models.super_120b(),
            stage="grpo",
            init_from="runs/sft_super",
            training=TrainingConfig(
                steps=STEPS,
                schedule=ScheduleConfig(
                    peak_learning_rate=3e-6,
                    final_learning_rate=3e-6,
                    warmup_tokens=WARMUP_STEPS * step_tokens,
                    decay_tokens=0,
                    total_tokens=STEPS * step_tokens,
                ),
                optimizer=OptimizerConfig(beta1=0.9, beta2=0.999, weight_decay=0.0, clip_norm=1.0),
                micro_batches=16,  # one row a chip
                mtp_depths=0,  # the block of the drafts is healed afterwards
                aux_loss_scale=0.0,
                router_bias_rate=1e-3,
                freeze_routers=True,
            ),
            data=DataConfig(sequence_length=EPISODE_TOKENS, batch_size=EPISODES),
            rl=reinforcement(),
            mesh=MeshConfig(data=2, fsdp=128),
            execution=Execution(compute_dtype="bfloat16", remat="full"),
            logging=LoggingConfig(
                log_every=1, evaluate_every=20, checkpoint_every=10, sample_tokens=0
            ),
        )
    )


def reinforcement() -> RLConfig:
    """Episodes and objective of the released run."""
    return RLConfig(
        rollout=RolloutConfig(
            environments=ENVIRONMENTS,
            prompts=PROMPTS,
            generations=GENERATIONS,
            max_tokens=EPISODE_TOKENS,
            max_turn_tokens=EPISODE_TOKENS,
            max_turns=200,
            temperature=1.0,
            thinking=True,
            low_effort=0.02,
            low_effort_tokens=3000,
            workers=64,
            timeout_s=3600.0,
        ),
        objective=ObjectiveConfig(
            ratio="one",
            clip_low=0.2,
            clip_high=0.28,
            importance_cap=5.0,
            sequence_limit=2.0,
            advantage_clip=50.0,
            turn_penalty=5.0,
            invalid_turns="penalise",
            cut_off_calls="invalid",
            overlong="keep",
            kl_weight=0.0,
        ),
        updates=1,
        max_age=1,
        pool_tasks=4096,
    )
