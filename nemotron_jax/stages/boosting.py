"""What training a model's drafts has changed: how many of them stand, before and after."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nemotron_jax.config.run import RunConfig
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.acceptance import length_of, submitted
from nemotron_jax.evaluation.facts import parameters_sha256
from nemotron_jax.evaluation.statistics import NORMAL_95
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.posttraining.own_text import beginnings
from nemotron_jax.posttraining.result_file import read_values, write_values
from nemotron_jax.pretrained import load_pretrained
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.types import Batch

DRAFTS = 5  # of a round
NEW_TOKENS = 64  # of each continuation
TEMPERATURES = (0.0, 1.0)  # greedy, where drafts are easiest, and the model's own


@dataclasses.dataclass(frozen=True)
class Drafted:
    """Continuations at one temperature, and the share of drafts at each place that stood."""

    requests: list[Request]
    by_position: tuple[float, ...]


def end(config: RunConfig, directory: RunDirectory, batches: Sequence[Batch], mesh: Mesh) -> str:
    """Write DIR/result.json of a finished run, once, and say what it holds: how the drafts of its
    first and its last model fare, on beginnings of held-out text."""
    found = read_values(directory.result)
    if not _extent(config).items() <= found.items():
        first, last = (
            load_pretrained(path, mesh=mesh, layout="training")
            for path in (config.init_from, directory.path)
        )
        found = result(config, first, last, batches)
        write_values(directory, found)
    return summary(found, directory)


def result(
    config: RunConfig, first: Nemotron, last: Nemotron, batches: Sequence[Batch]
) -> dict[str, Any]:
    """Tokens that a verification of DRAFTS drafts gives, before and after, at each temperature.

    `interval` is the 95 % interval of the gain, paired by prompt; `by_position` is at the last
    temperature. The backbones' hashes are equal where it has not moved by a bit.
    """
    count, objective = config.objective.result_prompts, config.objective
    prompts = [
        start
        for batch in batches
        for start in beginnings(batch, objective.prompt_tokens, config.model.eos_token)
    ][:count]
    temperatures = {}
    for temperature in TEMPERATURES:
        before, after = (drafted(config, model, prompts, temperature) for model in (first, last))
        temperatures[f"{temperature:g}"] = _compared(before.requests, after.requests)
    return {
        "format": "nemotron_jax.result",
        "format_version": 1,
        "stage": "boosting",
        "k": DRAFTS,
        "temperatures": temperatures,
        "by_position_before": list(before.by_position),
        "by_position_after": list(after.by_position),
        "backbone_sha256_before": _backbone_sha256(first),
        "backbone_sha256_after": _backbone_sha256(last),
        "controls": {},
        **_extent(config),
    }


def drafted(
    config: RunConfig, model: Nemotron, prompts: Sequence[tuple[int, ...]], temperature: float
) -> Drafted:
    """Continuations of the prompts, as the run's last step computes."""
    execution = config.execution.at_step(config.training.steps - 1)
    lockstep = Lockstep(model, execution, speculative=DRAFTS)
    wanted = Wanted(NEW_TOKENS, temperature=temperature, seed=config.seed)
    requests = submitted(lockstep, prompts, wanted)
    lockstep.run()
    return Drafted(requests, lockstep.stats().acceptance.by_position)


def summary(found: dict[str, Any], directory: RunDirectory) -> str:
    """A result as a short table."""
    rows = {}
    for temperature, part in found["temperatures"].items():
        low, high = part["interval"]
        rows[f"drafts at {temperature}"] = (
            f"{part['before']:.3f} tokens a verification, {part['after']:.3f} after, "
            f"gain {low:+.3f} to {high:+.3f} (95 %, n={part['n']})"
        )
    same = found["backbone_sha256_before"] == found["backbone_sha256_after"]
    rows["backbone"] = "the same to the bit" if same else "has moved"
    rows["result"] = directory.result
    return "\n".join(f"{name:15}{value}" for name, value in rows.items())


def _compared(before: Sequence[Request], after: Sequence[Request]) -> dict[str, Any]:
    """Mean lengths of the same prompts' verifications, and the interval of their difference."""
    means = [length_of(requests).mean for requests in (before, after)]
    parts = []
    for requests, mean in zip((before, after), means, strict=True):
        verified = np.array([request.verifications for request in requests], np.float64)
        tokens = verified + [request.accepted_drafts for request in requests]
        parts.append((tokens - mean * verified) / max(verified.mean(), 1e-9))
    residuals = parts[1] - parts[0]
    error = NORMAL_95 * residuals.std(ddof=1) / math.sqrt(len(residuals)) if len(before) > 1 else 0
    gain = means[1] - means[0]
    return {
        "before": means[0],
        "after": means[1],
        "interval": [float(gain - error), float(gain + error)],
        "n": len(before),
    }


def _backbone_sha256(model: Nemotron) -> str:
    """Of every parameter but the MTP block's."""
    backbone = copy.copy(model)
    backbone.mtp_block = nnx.data(None)
    return parameters_sha256(backbone)


def _extent(config: RunConfig) -> dict[str, int]:
    return {"steps": config.training.steps, "result_prompts": config.objective.result_prompts}
