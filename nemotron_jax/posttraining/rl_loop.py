"""Reinforcement learning: episodes of the model as it stands, as the batches of a training loop."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.rl import PreferenceConfig, RolloutConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.chat.render import ChatOptions
from nemotron_jax.data.chat.tokens import prompt_length
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Environment, Verdict
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.conversations import Sampler, make_sampler
from nemotron_jax.playing.episode import Episode
from nemotron_jax.playing.players import Here, Players
from nemotron_jax.playing.ray_workers import check_ray
from nemotron_jax.playing.rollout import Playing
from nemotron_jax.posttraining.curriculum import (
    Pools,
    played_environments,
    step_seed,
    step_tasks,
)
from nemotron_jax.posttraining.grpo import PolicyBatch, group_advantages, low_effort_reward
from nemotron_jax.posttraining.health import check_counted, health
from nemotron_jax.posttraining.policy_batch import (
    logprob_gap,
    policy_batch,
    rows_needed,
    score_tokens,
)
from nemotron_jax.posttraining.preference import Judge, make_judge, preference_rewards

OnEpisodes = Callable[[int, Sequence[Episode], Sequence[float]], None]
# What the episodes of a batch are paid, given the run's rollout and seed and the batch's number.
Pay = Callable[[Sequence[Episode], RolloutConfig, int, int], Float[np.ndarray, "N"]]


class Rollouts:
    """The batches of stage `grpo`: each is made by playing with the model that is to learn from it.

    Tasks, draws and everything else of step n are functions of the config and of n, so a run that
    goes on from a checkpoint plays what it would have played. With `rl.max_age` = 1 the next
    batch's first turns are played before the step, by weights one step older than those that play
    the rest: workers play their environments while the step is computed. `state` counts what was
    handed out and holds what is in flight.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        *,
        players: Players | None = None,
        reference: Nemotron | None = None,
        pools: Pools | None = None,
        sampler: Sampler | None = None,
        pay: Pay | None = None,
        on_episodes: OnEpisodes | None = None,
    ) -> None:
        """`sampler` is how the model is asked, by default as the config says; `reference` is what
        the KL term holds on to; `pools` are the tasks, fresh ones by default; `pay` is what
        episodes are worth, `shaped_rewards` by default; `on_episodes` gets each batch's number,
        episodes and rewards."""
        check_rollouts(config)
        self._config, self._tokenizer, self._pools = config, tokenizer, pools
        self._sampler = sampler or make_sampler(config.rl.rollout)
        self._pay = pay or shaped_rewards
        self._players = Here() if players is None else players
        self._reference, self._on_episodes = reference, on_episodes
        self._judge = make_judge(config.rl.preference) if config.rl.preference.judge else None
        self._step = 0
        self._batch: PolicyBatch | None = None
        self._in_flight: Playing | None = None
        self._report: dict[str, float] = {}

    def next_with(self, model: Nemotron) -> PolicyBatch:
        """The batch of the next optimizer step, made with `model`."""
        config, updates = self._config, self._config.rl.updates
        number, update = divmod(self._step, updates)
        if update == 0 or self._batch is None:
            playing = self._in_flight or self._begin(number)
            seconds = self._play(playing, model)
            self._batch = self._learn_from(playing.finish(), model, number)
            self._in_flight = None
            if config.rl.max_age and self._step + updates < config.training.steps:
                self._in_flight = self._begin(number + 1)
                seconds += self._play(self._in_flight, model, config.rl.early_turns)
            self._report |= {"rollout_seconds": seconds}
        self._step += 1
        return self._batch

    def report(self) -> Mapping[str, float]:
        """Values of the last batch, for the step's record."""
        return self._report

    def state(self) -> dict[str, Any]:
        """What has been handed out and what is in flight, for a checkpoint."""
        playing, batch = self._in_flight, self._batch
        begun = batch is not None and self._step % self._config.rl.updates > 0
        return {
            "step": self._step,
            "in_flight": None if playing is None else playing.state(),
            "batch": _as_lists(batch) if begun else None,  # more updates are to come of it
            "report": dict(self._report) if begun else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after what `state` counts."""
        self._step, self._batch, self._in_flight = state["step"], None, None
        self._report = dict(state.get("report", {}))
        if state["batch"] is not None:
            self._batch = _of_lists(state["batch"])
        if state["in_flight"] is not None:
            following = -(-self._step // self._config.rl.updates)
            self._in_flight = self._begin(following)
            self._in_flight.restore(state["in_flight"])

    def close(self) -> None:
        """End the environments' sessions."""
        self._players.close()

    def _begin(self, number: int) -> Playing:
        config = self._config
        tasks, low_effort = step_tasks(config.rl.rollout, config.seed, number, self._pools)
        return Playing(
            self._tokenizer,
            self._players,
            tasks,
            config.rl.rollout,
            sampler=self._sampler,
            seed=step_seed(config.seed, number),
            copies=config.rl.rollout.generations,
            low_effort=low_effort,
            execution=config.execution.at_step(self._step),
        )

    def _play(self, playing: Playing, model: Nemotron, most: int | None = None) -> float:
        """Play up to so many turns, by default all; the seconds that it took."""
        began, played = time.perf_counter(), 0
        while played != most and not playing.over:
            playing.turn(model, self._step)
            played += 1
        return time.perf_counter() - began

    def _learn_from(self, episodes: Sequence[Episode], model: Nemotron, number: int) -> PolicyBatch:
        config, began = self._config, time.perf_counter()
        if config.rl.preference.judge:
            episodes = judged(episodes, config.rl.preference, self._judge)
        check_counted(episodes, f"batch {number}")
        rewards = self._pay(episodes, config.rl.rollout, config.seed, number)
        objective = config.rl.objective
        groups = np.array([episode.group for episode in episodes])
        counted = np.array([episode.counted for episode in episodes])
        advantages = group_advantages(rewards, groups, counted, objective.advantage_clip)
        score = functools.partial(
            score_tokens,
            execution=config.execution.at_step(self._step),
            chunk=config.training.loss_chunk,
            temperature=config.rl.rollout.temperature,
        )
        batch, mismatches = policy_batch(
            episodes,
            advantages,
            score,
            model,
            rows=config.data.batch_size,
            row_tokens=config.data.sequence_length,
            objective=objective,
            reference=self._reference,
        )
        self._report = health(episodes, rewards, mismatches, objective.sequence_limit)
        ages = [self._step - turn.version for e in episodes for turn in e.turns]
        self._report |= {
            "logprob_gap": logprob_gap(batch),
            "age": float(max(ages, default=0)),
            "scoring_seconds": time.perf_counter() - began,
        }
        if self._on_episodes is not None:
            self._on_episodes(number, episodes, rewards.tolist())
        return batch


def _as_lists(batch: PolicyBatch) -> dict[str, Any]:
    """A batch as JSON values, to the last digit."""
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {
        name: None if array is None else [str(np.asarray(array).dtype), np.asarray(array).tolist()]
        for name, array in arrays.items()
    }


def _of_lists(values: dict[str, Any]) -> PolicyBatch:
    arrays = {n: None if v is None else np.array(v[1], v[0]) for n, v in values.items()}
    return PolicyBatch(**arrays)


def judged(episodes: Sequence[Episode], config: PreferenceConfig, judge: Judge) -> list[Episode]:
    """The episodes, paid by comparison where their environment is to be; one of those that nothing
    was judged of counts for nothing."""
    names = config.environments
    places = [n for n, e in enumerate(episodes) if not names or e.task.environment in names]
    found = preference_rewards([episodes[n] for n in places], config, judge).tolist()
    silent = Verdict(0.0, infra_error="no comparison was judged")
    out = list(episodes)
    for place, score in zip(places, found, strict=True):
        one, known = episodes[place], not math.isnan(score)
        if known or not one.counted:
            out[place] = dataclasses.replace(one, paid=score if known else None)
        else:
            out[place] = dataclasses.replace(one, verdict=silent)
    return out


def check_rollouts(config: RunConfig) -> None:
    """Raise ValueError for a run whose episodes cannot be played or do not fit its batch."""
    sources = played_environments(config.rl.rollout)
    if config.rl.rollout.workers:
        registry.packed({one.name for one, _ in sources})  # refuses what cannot be sent
    rule = "must name at least one environment"
    check_value("RolloutConfig", "environments", (), bool(sources), rule)
    names = config.rl.rollout.environments
    rule = "must name each environment and level once; give it a share in rl.rollout.shares"
    check_value("RolloutConfig", "environments", names, len(set(names)) == len(names), rule)
    names, compared = {one.name for one, _ in sources}, config.rl.preference.environments
    rule = f"must be among those that are played: {', '.join(sorted(names))}"
    check_value("PreferenceConfig", "environments", compared, names.issuperset(compared), rule)
    low_effort, marked = config.rl.rollout.low_effort, config.rl.rollout.low_effort_environments
    rule = (
        f"must be 0 where none of low_effort_environments={marked} is played; name some of "
        f"{', '.join(sorted(names))} there"
    )
    asked = not low_effort or bool(names.intersection(marked))
    check_value("RolloutConfig", "low_effort", low_effort, asked, rule)
    if config.rl.preference.judge:
        make_judge(
            config.rl.preference
        )  # refuses a key that is not there, before anything is played
    data, rollout = config.data, config.rl.rollout
    needed = rows_needed(rollout, data.sequence_length)
    drafts = rollout.speculative == 0 or config.model.mtp is not None
    rule = "needs an MTP block to draft with, and model.mtp is None; use 0"
    check_value("RolloutConfig", "speculative", rollout.speculative, drafts, rule)
    episodes = rollout.prompts * rollout.generations
    rule = f"must be at most {episodes}, the episodes of a step, each of which one worker plays"
    check_value("RolloutConfig", "workers", rollout.workers, rollout.workers <= episodes, rule)
    if rollout.workers and rollout.worker_kind == "ray":
        check_ray()
    if config.rl.easy_slip:
        _check_slip(config.rl.easy_slip, sources, config.seed)
    rule = f"must be at least rl.rollout.max_tokens={rollout.max_tokens}, the longest episode"
    check_value("DataConfig", "sequence_length", data.sequence_length, needed > 0, rule)
    rule = (
        f"must be at least {needed}, which {episodes} episodes of up to {rollout.max_tokens} "
        f"tokens need in rows of {data.sequence_length}"
    )
    check_value("DataConfig", "batch_size", data.batch_size, data.batch_size >= needed, rule)


def _check_slip(slip: str, sources: Sequence[tuple[Environment, int | None]], seed: int) -> None:
    known: set[str] = set()
    for environment, level in sources:
        known |= environment.slips(environment.split(seed, "train", 0, level=level)).keys()
    rule = f"must be a slip of an environment that is played: {', '.join(sorted(known))}"
    check_value("RLConfig", "easy_slip", slip, slip in known, rule)


def check_prompts(rollout: RolloutConfig, seed: int, tokenizer: Tokenizer | str) -> None:
    """Raise ValueError where no prompt of the first batch leaves any room to answer.

    Of a tokenizer that is yet to be trained its pattern is given, which says how short they can be.
    """
    tasks, low_effort = step_tasks(rollout, seed, 0)
    lengths = []
    for task, low in zip(tasks, low_effort, strict=True):
        options = ChatOptions(enable_thinking=rollout.thinking, low_effort=low)
        with contextlib.suppress(Exception):  # one that cannot be encoded costs its episode alone
            lengths.append(prompt_length(tokenizer, task.messages, task.tools, options))
    if not lengths:
        return
    least = "" if isinstance(tokenizer, Tokenizer) else "at least "
    rule = (
        f"the shortest prompt of the first {len(tasks)} has {least}{min(lengths)} tokens, so that "
        "none leaves room to answer; raise it, or name other rl.rollout.environments"
    )
    fits = min(lengths) < rollout.max_tokens
    check_value("RolloutConfig", "max_tokens", rollout.max_tokens, fits, rule)


def shaped_rewards(
    episodes: Sequence[Episode], config: RolloutConfig, seed: int, number: int
) -> Float[np.ndarray, "N"]:
    """What episodes earned, with the length reward where low effort was asked for."""
    return np.array(
        [
            low_effort_reward(e.reward, e.last_tokens, config.low_effort_tokens)
            if e.low_effort
            else e.reward
            for e in episodes
        ],
        np.float32,
    )
