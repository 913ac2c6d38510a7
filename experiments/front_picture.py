"""The picture on the project's first page: python -m experiments.front_picture [--output=FILE].

Its upper part are the layers of Nemotron 3 Super, read from configs/models.py; its lower part are
the runs of docs/evidence/grpo_tiny/evidence.json, which `python -m experiments.grpo_tiny` made.
Nothing is measured anew.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

from configs import models
from nemotron_jax.files import atomic_writer

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "grpo_tiny" / "evidence.json"
PICTURE = ROOT / "docs" / "pictures" / "front.png"
INCHES, DPI = (9.0, 5.0), 130
LAYERS = {"M": ("Mamba-2", "#4c78a8"), "E": ("LatentMoE", "#f0a030"), "*": ("attention", "#b02a30")}
ARMS = {
    "earned": ("GRPO, rewards as earned", "#1a9850"),
    "own_right_samples": ("fine-tuned on its own right answers", "#7b6aa8"),
    "fine_tuned": ("more of the same fine-tuning", "#888888"),
    "permuted": ("GRPO, the same rewards at random", "#b02a30"),
}


def main() -> int:
    """Draw the picture; the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.front_picture", description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    output = parser.parse_args().output
    with atomic_writer(output) as file:
        file.write(drawn(models.super_120b().pattern, json.loads(EVIDENCE.read_text())["runs"]))
    print(output)
    return 0


def drawn(pattern: str, runs: list[dict[str, Any]]) -> bytes:
    """A PNG of a model's layers over the success of runs by the tokens that they learned from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 6))
    _layers(above, pattern)
    _curves(below, runs)
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    return png.getvalue()


def _layers(axes: Any, pattern: str) -> None:
    for letter, (name, colour) in LAYERS.items():
        places = [place for place, kind in enumerate(pattern) if kind == letter]
        label = f"{name}: {len(places)}"
        axes.bar(places, [1] * len(places), width=0.8, color=colour, label=label)
    axes.set_title(
        f"Nemotron 3 Super, {len(pattern)} layers, from the first to the last", fontsize=10
    )
    axes.set_axis_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, fontsize=9, frameon=False)


def _curves(axes: Any, runs: list[dict[str, Any]]) -> None:
    for arm, (name, colour) in ARMS.items():
        of_arm = [run for run in runs if run["arm"] == arm]
        for number, run in enumerate(of_arm):
            tokens = [step / run["steps"] * run["n_tokens"] / 1000 for step, _ in run["curve"]]
            success = [value for _, value in run["curve"]]
            label = f"{name} ({len(of_arm)} seeds)" if number == 0 else None
            axes.plot(tokens, success, marker="o", markersize=4, color=colour, label=label)
    axes.set_title(
        "A 0.55 M-parameter model learns to use a calculator, on two CPU cores", fontsize=10
    )
    axes.set_xlabel("thousand tokens learned from")
    axes.set_ylabel("success on held-out tasks")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    raise SystemExit(main())
