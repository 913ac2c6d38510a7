"""What reinforcement learning has changed: held-out tasks played before and after it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import RLConfig
from nemotron_jax.data.messages import played_conversation
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Task
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.conversations import make_sampler
from nemotron_jax.posttraining.curriculum import held_out_tasks
from nemotron_jax.posttraining.success import play_tasks_once
from nemotron_jax.run_directory import RunDirectory

Values = dict[str, float | int | list[float] | dict]

_NORMAL_95 = 1.96  # standard deviations on either side of a mean's 95 % interval


def result(
    before: Nemotron,
    after: Nemotron,
    tokenizer: Tokenizer,
    rl: RLConfig,
    seed: int,
    execution: Execution,
) -> Values:
    """Mean reward on held-out tasks before and after, and the 95 % interval of the gain.

    The same tasks are played once each by both, sampled as in training. `easy_…` are those of the
    tasks that the slip `rl.easy_slip` gets right; `environments` holds the same for each one.
    """
    tasks = held_out_tasks(rl.rollout, seed, rl.result_tasks)
    sampler = make_sampler(rl.rollout)
    rewards = []
    for model in (before, after):
        episodes = play_tasks_once(
            model,
            tokenizer,
            rl.rollout,
            tasks,
            seed=seed + 1,
            sampler=sampler,
            execution=execution,
        )
        rewards.append(np.array([e.verdict.reward if e.counted else np.nan for e in episodes]))
    found = compared(*rewards)
    if rl.easy_slip:
        easy = easy_tasks(tasks, rl.easy_slip)
        for name, part in (("easy", easy), ("hard", ~easy)):
            values = compared(*(one[part] for one in rewards))
            found |= {f"{name}_{key}": value for key, value in values.items()}
    names = sorted({task.environment for task in tasks})
    places = {name: np.array([t.environment == name for t in tasks]) for name in names}
    each = {name: compared(*(one[place] for one in rewards)) for name, place in places.items()}
    return found | {"environments": each}


def compared(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> Values:
    """Means of rewards of the same tasks, and the interval of the mean of their differences.

    Tasks whose environment failed either time (NaN) are left out.
    """
    kept = ~(np.isnan(before) | np.isnan(after))
    before, after = before[kept], after[kept]
    gains = after - before
    error = _NORMAL_95 * gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 1.0
    middle = gains.mean() if len(gains) else 0.0
    mean = lambda values: float(values.mean()) if len(values) else 0.0
    interval = [float(middle - error), float(middle + error)]
    return {
        "before": mean(before),
        "after": mean(after),
        "n": len(gains),
        "interval": interval,
    }


def easy_tasks(tasks: Sequence[Task], slip: str) -> Bool[np.ndarray, "N"]:
    """Which tasks a slip of that name gets right."""

    def is_right(task: Task) -> bool:
        environment = registry[task.environment]
        turns = environment.slips(task).get(slip)
        return turns is not None and played_conversation(environment, task, turns)[1] == 1

    return np.array([is_right(task) for task in tasks], bool)


def summary(found: Values, directory: RunDirectory) -> str:
    """A result as a short table."""
    low, high = found["interval"]
    rows = {
        "success": f"{found['before']:.3f} before, {found['after']:.3f} after, "
        f"gain {low:+.3f} to {high:+.3f} (95 %, n={found['n']})",
    }
    if "easy_before" in found:
        rows["easy tasks"] = f"{found['easy_before']:.3f} before, {found['easy_after']:.3f} after"
    if len(found["environments"]) > 1:
        for name, part in found["environments"].items():
            low, high = part["interval"]
            rows[name] = f"{part['before']:.3f} to {part['after']:.3f}, {low:+.3f} to {high:+.3f}"
    rows["result"] = directory.result
    return "\n".join(f"{name:22}{value}" for name, value in rows.items())
