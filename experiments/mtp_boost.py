"""Do drafts learn more from the model than from the text? python -m experiments.mtp_boost [--quick]

A small model is pre-trained with its drafts (`before`). Then the block of the drafts alone is
trained for as many steps in each arm, on text that the model itself has written at temperature 1:
`kl` on what the model predicts there, `cross_entropy` on what it has drawn. What is compared is how
many tokens a verification of five drafts gives at temperature 1; temperature 0 and the places of
the drafts are in `more`.
"""

import sys

from experiments import short
from experiments.harness import Arm, Experiment, main

STEPS, LONGER, SEEDS = 150, 24, (0, 1, 2)


def experiment(
    steps: int = STEPS,
    longer: int = LONGER,
    seeds: tuple[int, ...] = SEEDS,
    name: str = "mtp_boost",
) -> Experiment:
    """All arms: so many steps of pre-training, and so many of the drafts after it."""
    run = lambda arm: short.arm("experiments.mtp_boost_arms", arm, (steps, longer))
    return Experiment(
        name=name,
        version=1,
        metric="tokens_per_verification",
        arms={
            "before": Arm(run("before"), {"steps": 0}),
            "kl": Arm(run("kl"), {"objective": {"mtp": "kl"}}, after="before"),
            "cross_entropy": Arm(
                run("cross_entropy"), {"objective": {"mtp": "cross_entropy"}}, after="before"
            ),
        },
        against="cross_entropy",
        seeds=seeds,
    )


if __name__ == "__main__":
    sys.exit(main(experiment(), experiment(6, 4, (0,), "mtp_boost_quick")))
