"""Do latent experts give more? python -m experiments.latent_moe [--seeds=0,1] [--quick]

Experts at a quarter of the model's width, four times as many of them, against the model with
experts at its whole width: nearly the same parameters, and the same FLOPs a token within two
percent.
"""

import dataclasses
import functools
import sys
from typing import Any

from experiments import pretraining
from experiments.harness import Arm, Experiment, main
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.accounting import active_parameters, parameters, training_flops

STEPS, SEEDS = 300, (0, 1, 2)
# Of 15 experts a token, where 16 would be four times the twin's: the projections into the latent
# width and out of it cost FLOPs too.
LATENT_WIDTH, EXPERTS, EXPERTS_PER_TOKEN = 32, 64, 15


def model_of(arm: str, tiny: ModelConfig) -> ModelConfig:
    """The model of an arm, from the tiny one."""
    moe = dataclasses.replace(
        tiny.moe,
        latent_width=LATENT_WIDTH,
        num_experts=EXPERTS,
        experts_per_token=EXPERTS_PER_TOKEN,
    )
    latent = dataclasses.replace(tiny, moe=moe)
    return latent if arm == "latent" else full_width_twin(latent)


def full_width_twin(config: ModelConfig) -> ModelConfig:
    """A model with its experts at full width, at nearly its parameters and FLOPs.

    Experts that are `width / latent_width` times wider allow as many times fewer of them; how many
    a token takes is the number whose active parameters come nearest (LatentMoE, arXiv:2601.18089).
    """
    moe = config.moe
    num_experts = moe.num_experts * moe.latent_width // config.width
    twins = [
        dataclasses.replace(
            config,
            moe=dataclasses.replace(
                moe, num_experts=num_experts, experts_per_token=k, latent_width=None
            ),
        )
        for k in range(1, min(num_experts, moe.experts_per_token) + 1)
    ]
    target = active_parameters(config)
    return min(twins, key=lambda twin: abs(active_parameters(twin) - target))


def config_of(arm: str, steps: int, seed: int) -> RunConfig:
    """One run."""
    config = pretraining.base(seed, steps)
    return dataclasses.replace(config, model=model_of(arm, config.model))


def size_of(config: RunConfig) -> dict[str, Any]:
    """What a run's model costs: FLOPs of a token's training, and parameters."""
    depths = config.training.mtp_depths
    flops = training_flops(config.model, config.data.sequence_length, mtp_depths=depths)
    return {
        "active_flops_per_token": flops.total,
        "parameters": parameters(config.model).total,
    }


def experiment(
    steps: int = STEPS, seeds: tuple[int, ...] = SEEDS, name: str = "latent_moe"
) -> Experiment:
    """Both arms, of so many steps."""
    arms = {
        arm: Arm(
            pretraining.arm(functools.partial(config_of, arm, steps), size_of),
            overrides={"model": {"moe": dataclasses.asdict(config_of(arm, steps, 0).model.moe)}},
        )
        for arm in ("latent", "full_width")
    }
    return Experiment(
        name=name,
        version=1,
        metric=pretraining.METRIC,
        arms=arms,
        against="full_width",
        seeds=seeds,
        relative=True,
    )


if __name__ == "__main__":
    sys.exit(main(experiment(), experiment(steps=6, seeds=(0,), name="latent_moe_quick")))
