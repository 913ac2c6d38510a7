"""What a run may change when it goes on from a checkpoint, and what it may not."""

import dataclasses
from typing import Any

from nemotron_jax.config.run import RunConfig

# These change no parameter that a step computes, but by rounding.
FREE_FIELDS = (
    "logging",
    "training.steps",
    "training.max_skipped_steps",
    "training.micro_batches",
    "training.loss_chunk",
    "data.prefetch",
    "mesh",
    "sft.success_tasks",
    "sft.success_tokens",
    "distill.result_rows",
    "objective.result_prompts",
    "rl.held_out_tasks",
    "rl.result_tasks",
    "rl.transcripts",
    "rl.preference.judge_timeout_s",
    "rl.preference.judge_calls",
    "rl.rollout.workers",
    "rl.rollout.worker_kind",
    "rl.rollout.timeout_s",
    "execution.remat",
    "execution.layers",
    "execution.kernels",
)


def check_resumable(saved: RunConfig, config: RunConfig, directory: str) -> None:
    """Raise ValueError naming every field whose change would make another run of this one."""
    before, now = (_flat(dataclasses.asdict(one)) for one in (saved, config))
    changed = [
        f"{name}={now.get(name)!r}, was {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not _is_free(name)
        and not _has_moved(name, before.get(name), now.get(name))
    ]
    if changed:
        raise ValueError(
            f"run {directory} was begun with other values: {'; '.join(changed)}; restore them, or "
            f"start in a new directory (free to change: {', '.join(FREE_FIELDS)})"
        )


def _is_free(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in FREE_FIELDS)


def _has_moved(name: str, before: Any, now: Any) -> bool:
    """Whether it is the address of the judge, who is the same one by `judge_model`."""
    is_address = lambda value: str(value).startswith(("http://", "https://"))
    return name == "rl.preference.judge" and is_address(before) and is_address(now)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Dotted names of every scalar and list of nested dictionaries."""
    if not isinstance(values, dict):
        return {path: values}
    parts = (_flat(value, f"{path}.{key}" if path else key) for key, value in values.items())
    return {name: value for part in parts for name, value in part.items()}
