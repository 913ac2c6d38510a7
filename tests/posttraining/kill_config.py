"""The run of reinforcement learning's kill tests, for train.py's command line."""

import dataclasses

from ml_collections import ConfigDict

from configs import grpo_tiny
from nemotron_jax.config.convert import from_config_dict, to_config_dict
from nemotron_jax.config.run import RunConfig
from tests.training.runs import changed

STEPS, PROMPTS, GENERATIONS = 16, 4, 3
SFT_STEPS = 24
ENVIRONMENTS = ("arithmetic/0", "retention/0")


def get_config() -> ConfigDict:
    """A run whose steps are short. Its model has hardly learned more than to end a turn, so answers
    are paid by comparison and their length: groups differ, and steps move weights. A conversation
    of `retention` goes on whatever the turn says, so that some are in flight at each step."""
    config = from_config_dict(RunConfig, grpo_tiny.get_config())
    warm_start = config.warm_start
    rollout = dataclasses.replace(
        config.rl.rollout,
        environments=ENVIRONMENTS,
        prompts=PROMPTS,
        generations=GENERATIONS,
        max_tokens=104,
        max_turn_tokens=6,
        low_effort=0.25,
        low_effort_tokens=10,
        workers=2,
    )
    preference = dataclasses.replace(config.rl.preference, judge="rules")
    small = changed(
        config,
        model={"width": 32, "pattern": "M"},
        sft={"oracle_tasks": 40},
        training={"steps": STEPS},
        data={"sequence_length": 104, "batch_size": PROMPTS * GENERATIONS},
        rl={
            "rollout": rollout,
            "preference": preference,
            "held_out_tasks": 4,
            "result_tasks": 8,
            "pool_tasks": 5,
            "pool_samples": 1,
            "transcripts": PROMPTS * GENERATIONS,
            "easy_slip": "",
        },
        mesh={"data": 1},
        logging={"evaluate_every": 8, "evaluate_rows": 4, "checkpoint_every": 2},
    )
    rate = {"peak_learning_rate": 1e-2, "final_learning_rate": 1e-2, "warmup_tokens": 0}
    schedule = dataclasses.replace(warm_start.training.schedule, **rate)
    first = changed(
        warm_start,
        training={"steps": SFT_STEPS, "schedule": schedule},
        data={
            "sources": tuple(f"oracle:{name}" for name in ENVIRONMENTS),
            "source_weights": (0.5, 0.5),
        },
    )
    return to_config_dict(dataclasses.replace(small, warm_start=first))
