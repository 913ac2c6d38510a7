"""Does a teacher help a quantised student? python -m experiments.qad [--seeds=0,1] [--quick]

A small model is pre-trained in float32. `rounded` computes with it in emulated NVFP4, untrained;
`distilled` trains that student on the predictions of the float32 model, and `ordinary` on the text,
for as many steps, on the same rows at the same rates. What is compared is how far the student's
predictions are from the teacher's, KL(teacher || student) of held-out text; losses are in `more`.
"""

import sys

from experiments import short
from experiments.harness import Arm, Experiment, main

STEPS, LONGER, SEEDS = 150, 40, (0, 1, 2)


def experiment(
    steps: int = STEPS, longer: int = LONGER, seeds: tuple[int, ...] = SEEDS, name: str = "qad"
) -> Experiment:
    """All arms: so many steps of pre-training, and so many after it."""
    run = lambda arm: short.arm("experiments.qad_arms", arm, (steps, longer))
    return Experiment(
        name=name,
        version=1,
        metric="teacher_kl",
        arms={
            "rounded": Arm(run("rounded"), {"steps": 0}),
            "distilled": Arm(run("distilled"), {"stage": "distill"}, after="rounded"),
            "ordinary": Arm(run("ordinary"), {"stage": "pretrain"}, after="rounded"),
        },
        against="rounded",
        seeds=seeds,
        positive_control="ordinary",  # which must lead away from the teacher
    )


if __name__ == "__main__":
    sys.exit(main(experiment(), experiment(6, 4, (0,), "qad_quick")))
