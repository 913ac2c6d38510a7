"""How often a model succeeds: held-out tasks, and those of pools, each played once."""

import contextlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.playing import PlayConfig
from nemotron_jax.config.rl import RLConfig, RolloutConfig
from nemotron_jax.config.run import DataConfig
from nemotron_jax.config.sft import SFTConfig
from nemotron_jax.data.messages import ORACLE, oracle_source
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.environments.base import Task
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.conversations import Sampler, SideBySide, make_sampler
from nemotron_jax.playing.episode import Episode
from nemotron_jax.playing.players import Here, Players
from nemotron_jax.playing.rollout import play_episodes
from nemotron_jax.posttraining.curriculum import PoolPlays, held_out_tasks, step_seed
from nemotron_jax.posttraining.health import check_counted
from nemotron_jax.training.report import Probe

# Held-out tasks of fine-tuning that are played side by side: each holds a cache of two rows'
# length.
_SIDE_BY_SIDE = 64


def success_of_oracles(
    tokenizer: Tokenizer, data: DataConfig, sft: SFTConfig, seed: int
) -> Probe | None:
    """A function of a model in fine-tuning: `success`, its mean reward on held-out tasks of the
    oracle sources.

    None where `sft` plays no tasks or no source is an oracle. Tasks are those that the oracle
    sources hold out, `sft.success_tasks` of each, played greedily and without reasoning, since
    oracles do not think aloud. A conversation may be as long as a row of the data.
    """
    sources = [source for source in data.sources if source.startswith(ORACLE)]
    if not sources or not sft.success_tasks:
        return None
    played = [oracle_source(source) for source in sources]
    tasks = [
        environment.split(seed, "held_out", index, level=level)
        for environment, level in played
        for index in range(sft.success_tasks)
    ]
    play = PlayConfig(
        max_tokens=data.sequence_length,
        max_turn_tokens=sft.success_tokens,
        max_turns=max(environment.max_turns for environment, _ in played),
        temperature=0.0,
    )
    size = min(len(tasks), _SIDE_BY_SIDE)

    def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
        sampler, episodes = SideBySide(play.max_tokens), []
        with contextlib.closing(Here()) as players:
            for part in _parts(tasks, size):
                episodes += play_episodes(
                    model,
                    tokenizer,
                    players,
                    part,
                    play,
                    sampler=sampler,
                    seed=0,
                    execution=execution,
                )
        return {"success": _mean_reward(episodes[: len(tasks)])}

    return evaluate


def success_of_tasks(
    tokenizer: Tokenizer, rl: RLConfig, seed: int, sampler: Sampler | None = None
) -> Probe:
    """A function of a model: `success`, its mean reward on held-out tasks, and that of each
    environment. `sampler` is the run's, by default one of its own."""
    tasks = held_out_tasks(rl.rollout, seed, rl.held_out_tasks)
    sampler = sampler or make_sampler(rl.rollout)

    def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
        draws = seed + 1
        episodes = play_tasks_once(
            model, tokenizer, rl.rollout, tasks, seed=draws, sampler=sampler, execution=execution
        )
        names = sorted({one.task.environment for one in episodes if one.counted})
        by_name = {name: [e for e in episodes if e.task.environment == name] for name in names}
        return {"success": _mean_reward(episodes)} | {
            f"success/{name}": _mean_reward(part) for name, part in by_name.items()
        }

    return evaluate


def pool_plays(
    model: Callable[[], Nemotron],
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    seed: int,
    *,
    players: Players,
    sampler: Sampler,
    execution: Execution,
) -> PoolPlays:
    """What plays the tasks of pools: each one's reward, NaN where its environment failed, which
    says nothing of how hard it is. The model is asked for when there is something to play."""

    def play(tasks: Sequence[Task], draw: int, first: int) -> list[float]:
        episodes = play_tasks_once(
            model(),
            tokenizer,
            rollout,
            tasks,
            seed=seed + 2 + draw,
            first=first,
            players=players,
            sampler=sampler,
            execution=execution,
        )
        return [one.verdict.reward if one.counted else math.nan for one in episodes]

    return play


def play_tasks_once(
    model: Nemotron,
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    tasks: Sequence[Task],
    *,
    seed: int,
    sampler: Sampler,
    execution: Execution,
    first: int = 0,
    players: Players | None = None,
) -> list[Episode]:
    """Each task played once as in training, as many side by side as there.

    `seed` is that of all draws, `first` the number of the first of these tasks among all that are
    played so. `players` are left open, those of this process are made for it.
    """
    size = rollout.prompts * rollout.generations
    episodes: list[Episode] = []
    with contextlib.ExitStack() as stack:
        if players is None:
            players = stack.enter_context(contextlib.closing(Here(rollout.timeout_s)))
        for number, part in enumerate(_parts(tasks, size)):
            episodes += play_episodes(
                model,
                tokenizer,
                players,
                part,
                rollout,
                sampler=sampler,
                seed=step_seed(seed, first + number * size),
                execution=execution,
            )
    episodes = episodes[: len(tasks)]
    if tasks:
        kind = "held-out tasks" if tasks[0].split == "held_out" else "the pools' tasks"
        check_counted(episodes, kind)
    return episodes


def _parts(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """The tasks, so many at a time; the last are filled up with one again: one shape, one
    program."""
    parts = [list(tasks[start : start + size]) for start in range(0, len(tasks), size)]
    return [part + part[:1] * (size - len(part)) for part in parts]


def _mean_reward(episodes: Sequence[Episode]) -> float:
    """Of those that count: where its environment failed, nothing is known of the model."""
    rewards = [one.verdict.reward for one in episodes if one.counted]
    return float(np.mean(rewards)) if rewards else 0.0
