"""Nemotron 3 Super, reinforcement learning from comparisons of the answers to one prompt.

Command:  python train.py --config=configs/rlhf_super.py --workdir=runs/rlhf_super \
              --config.rl.preference.judge=http://HOST:8000/v1 \
              --config.rl.preference.judge_model=NAME
          The judge is one of NVIDIA's generative reward models, such as
          nvidia/Qwen3-Nemotron-235B-A22B-GenRM. Of any other model:
              --config.rl.preference.judge_format=words.
Hardware: v5p:8x8x4, with what configs/rlvr_super.py says of it, and a server of the judge.
          507 s a step as estimated, 275 of them for the episodes, were all of full length.
Expected: not run here. The tests pin its figures to the published ones.
Source:   stage3_rlhf of NVIDIA's recipe for Super (NVIDIA-NeMo/Nemotron). Its prompts are of human
          conversations, with single steps of tool use beside them; what stands here for both are
          environments of this project. The number of steps was not published.
"""

from ml_collections import ConfigDict

from configs import rlvr_super
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.run import ScheduleConfig

PROMPTS, STEPS, RATE = 128, 100, 1e-6
COMPARED = ("instruction_following", "inverse_instructions", "over_refusal", "refusal")
OWN_REWARD = ("search_pivot", "tool_choice", "tool_schema")


def get_config() -> ConfigDict:
    """The run of verified rewards with other prompts, rewards and rate, and a KL term."""
    config = rlvr_super.get_config()
    config.init_from = "runs/rlvr_super/grpo"
    config.rl.rollout.environments = (*COMPARED, *OWN_REWARD)
    config.rl.rollout.prompts = PROMPTS
    config.rl.rollout.max_turns = 1
    config.rl.rollout.low_effort = 0.0
    config.rl.pool_tasks = 0
    config.rl.objective.kl_weight = 1e-4
    config.rl.preference.judge = "http://127.0.0.1:8000/v1"
    config.rl.preference.judge_format = "genrm"
    config.rl.preference.environments = COMPARED
    config.rl.preference.reasoning_weight = 0.3
    config.rl.preference.answer_weight = 0.35
    config.rl.preference.style_weight = 0.05
    config.data.batch_size = PROMPTS * rlvr_super.GENERATIONS
    config.training.micro_batches = 8  # one row a chip
    config.training.steps = STEPS
    step_tokens = config.data.batch_size * config.data.sequence_length
    schedule = ScheduleConfig(
        peak_learning_rate=RATE,
        final_learning_rate=RATE,
        warmup_tokens=rlvr_super.WARMUP_STEPS * step_tokens,
        decay_tokens=0,
        total_tokens=STEPS * step_tokens,
    )
    config.training.schedule = to_config_dict(schedule)
    return config
