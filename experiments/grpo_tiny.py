"""Does configs/grpo_tiny.py learn from its rewards? python -m experiments.grpo_tiny [--seeds=0,1]

Beside runs that are paid what they earned: one whose rewards are dealt out at random, which must
not teach the task, one that goes on with its fine-tuning for as many tokens, and one that is
fine-tuned on its first model's own right episodes. All arms of a seed begin with the same model;
first and last models are also tried at tasks unlike those of the training (carried_over.py).
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from configs import grpo_tiny
from experiments.harness import Arm, Experiment, Measured, main
from nemotron_jax import host
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig


def config_of(seed: int) -> RunConfig:
    """The run that every arm is a change of."""
    return dataclasses.replace(from_config_dict(RunConfig, grpo_tiny.get_config()), seed=seed)


def _arm(name: str) -> Callable[[int, Path, Path | None], Measured | None]:
    """An arm of grpo_arms.py."""

    def run(seed: int, directory: Path, before: Path | None) -> Measured | None:
        config = config_of(seed)
        host.keep_compiled_programs()
        host.show_cpu_devices(config.mesh.size)
        # jax reads the environment when it is imported; the process that starts runs needs none.
        from experiments import grpo_arms

        return getattr(grpo_arms, name)(config, directory, before)

    return run


EXPERIMENT = Experiment(
    name="grpo_tiny",
    version=2,
    metric="success",
    arms={
        "earned": Arm(_arm("earned")),
        "permuted": Arm(_arm("permuted"), {"rewards": "permuted"}, after="earned"),
        "fine_tuned": Arm(_arm("fine_tuned"), {"stage": "sft"}, after="earned"),
        "own_right_samples": Arm(
            _arm("own_right_samples"), {"stage": "sft", "data": "right episodes"}, after="earned"
        ),
    },
    against="earned",
    seeds=(0, 1),
    positive_control="permuted",  # without a signal nothing is learned
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
