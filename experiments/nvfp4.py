"""Does NVFP4 train as float32 does? python -m experiments.nvfp4 [--seeds=0,1] [--quick]

Every arm of a seed begins with the same parameters and reads the same text in the same order. What
the recipe of Nemotron 3 Super costs is the difference of its held-out loss from float32's, relative
to that. How much of a difference is chance says float32 on two devices, which adds up in another
order. Two controls say whether a run of this size can tell formats apart: every matmul in NVFP4,
and that without any of the recipe's protections.

Products are of float32 numbers, rounded to NVFP4 and MXFP8 where the recipe says so: an emulation,
whose speed says nothing about chips. What the recipe keeps in high precision is float32.
"""

import dataclasses
import functools
import sys

from experiments import pretraining
from experiments.harness import Arm, Experiment, main
from nemotron_jax.config.precision import (
    ROLES,
    NVFP4Config,
    PrecisionConfig,
    nemotron3_nvfp4,
)
from nemotron_jax.config.run import MeshConfig, RunConfig

STEPS, SEEDS = 300, (0, 1, 2, 3, 4)
FEWER = 3  # seeds of the arms beside the main pair, its noise and the controls
LAST_HIGH = 1  # of the tiny model's seven layers: 15 %
SWITCHED = 0.85  # share of the steps before the last ones in high precision

_RECIPE = nemotron3_nvfp4(LAST_HIGH)


def _changed(**fields: object) -> PrecisionConfig:
    return dataclasses.replace(_RECIPE, nvfp4=NVFP4Config(**fields))


def recipes(steps: int) -> dict[str, PrecisionConfig]:
    """The precision of each arm."""
    return {
        "float32": PrecisionConfig(),
        "float32_reordered": PrecisionConfig(),
        "nvfp4": _RECIPE,
        "no_stochastic_gradients": _changed(gradient_rounding="nearest"),
        "no_hadamard": _changed(hadamard=False),
        "weights_1d": _changed(weight_block="1x16"),
        "stochastic_activations": _changed(activation_rounding="stochastic"),
        "all_layers": PrecisionConfig(nvfp4_roles=ROLES),
        "unprotected": PrecisionConfig(
            nvfp4_roles=ROLES,
            nvfp4=NVFP4Config(gradient_rounding="nearest", hadamard=False, weight_block="1x16"),
        ),
        "last_15_bf16": dataclasses.replace(
            _RECIPE,
            switch_step=round(SWITCHED * steps),
            switch_roles=_RECIPE.nvfp4_roles + _RECIPE.mxfp8_roles,
        ),
    }


def config_of(arm: str, steps: int, seed: int) -> RunConfig:
    """One run."""
    config = pretraining.base(seed, steps)
    mesh = MeshConfig(data=2) if arm == "float32_reordered" else config.mesh
    execution = dataclasses.replace(config.execution, precision=recipes(steps)[arm])
    return dataclasses.replace(config, mesh=mesh, execution=execution)


def experiment(
    steps: int = STEPS, seeds: tuple[int, ...] = SEEDS, name: str = "nvfp4"
) -> Experiment:
    """All arms, of so many steps."""
    every = ("float32", "float32_reordered", "nvfp4", "all_layers", "unprotected")
    arms = {
        arm: Arm(
            pretraining.arm(functools.partial(config_of, arm, steps)),
            overrides={"precision": dataclasses.asdict(recipe)},
            most_seeds=None if arm in every else FEWER,
        )
        for arm, recipe in recipes(steps).items()
    }
    arms["float32_reordered"] = dataclasses.replace(
        arms["float32_reordered"], overrides={"mesh": {"data": 2}}
    )
    return Experiment(
        name=name,
        version=1,
        metric=pretraining.METRIC,
        arms=arms,
        against="float32",
        seeds=seeds,
        relative=True,
        noise_floor="float32_reordered",
        positive_control="unprotected",
        also_against="nvfp4",
    )


if __name__ == "__main__":
    sys.exit(main(experiment(), experiment(steps=6, seeds=(0,), name="nvfp4_quick")))
