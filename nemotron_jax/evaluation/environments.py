"""What a model solves: held-out tasks of environments, by level."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemotron_jax.config.checks import at_least_one, check, is_integer
from nemotron_jax.config.playing import PlayConfig
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.environments.base import Environment, Task, play
from nemotron_jax.environments.catalogue import find, task_source
from nemotron_jax.environments.turns import Turn
from nemotron_jax.evaluation.answers import Answer, Ask
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.statistics import (
    counts_of,
    items_of,
    pass_items,
    pass_values,
    value_over,
)
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import (
    Plot,
    Result,
    Score,
    Suite,
    Table,
    Unavailable,
    as_tuples,
    once_each,
)
from nemotron_jax.playing.episode import Episode
from nemotron_jax.playing.players import Here
from nemotron_jax.playing.rollout import play_episodes

# Episodes that are played at one time where a run does not say how many; draws hang on it.
SIDE_BY_SIDE = 128
COLUMNS = ("environment", "level", "tasks", "reward", "low", "high", "pass@1", "tokens an answer")
DEFAULT = ("arithmetic",)  # where a run names none
_PLAY = ("max_tokens", "max_turn_tokens", "max_turns", "temperature")
_FALLBACK = PlayConfig(max_tokens=1024, max_turn_tokens=256)
Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """`tasks` of each level of each environment, `k` samples of each task.

    `names` are NAME or NAME/LEVEL as a run's `rl.rollout.environments`, and those of the run where
    none is given; `levels` are numbers, "all", or None for the lowest and the highest. The others
    are `PlayConfig`'s, and those of the run where None.
    """

    names: tuple[str, ...] = ()
    levels: tuple[int, ...] | str | None = None
    tasks: int = 64
    k: int = 1
    thinking: bool = False
    max_tokens: int | None = None
    max_turn_tokens: int | None = None
    max_turns: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        as_tuples(self, "names", *(("levels",) if self.levels not in (None, "all") else ()))
        at_least_one(self, "tasks", "k")
        check(self, "thinking", isinstance(self.thinking, bool), "must be True or False")
        ok = all(isinstance(name, str) for name in self.names)
        ok = ok and (not self.names or once_each(self.names))
        check(self, "names", ok, "must be names of environments, each once, as in (arithmetic,sql)")
        ok = self.levels in (None, "all")
        ok = ok or once_each(self.levels) and all(map(is_integer, self.levels))
        check(self, "levels", ok, "must be numbers, each once, as in (0,3), or all")
        self.play(_FALLBACK)

    def play(self, config: PlayConfig) -> PlayConfig:
        """How tasks are played, where nothing else is said as `config` says."""
        own = {name: v for name in _PLAY if (v := getattr(self, name)) is not None}
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(PlayConfig)}
        budget = values["budget"] if self.thinking else None
        return PlayConfig(**values | own | {"thinking": self.thinking, "budget": budget})


@dataclasses.dataclass(frozen=True)
class Level:
    """An environment at one level."""

    environment: Environment
    level: int

    def task(self, seed: int, index: int) -> Task:
        """A held-out task."""
        return self.environment.split(seed, "held_out", index, level=self.level)


def levels_of(subject: Subject, options: Options) -> list[Level]:
    """What is played. Raises ValueError for an environment or a level that does not exist, and
    Unavailable for one that cannot run here."""
    rollout = _rollout(subject)
    named = options.names or (rollout.environments if rollout else ()) or DEFAULT
    found = []
    for name in named:
        environment, level = task_source(name, f"environments:names={name!r}")
        if reason := environment.unavailable():
            raise Unavailable(f"{environment.name}: {reason}")
        last = environment.levels - 1
        chosen = options.levels
        if level is not None:
            levels: Sequence[int] = (level,)
        elif chosen is None or chosen == "all":
            levels = range(last + 1) if chosen == "all" else sorted({0, last})
        else:
            levels = chosen
        for one in levels:
            check(options, "levels", 0 <= one <= last, f"{name} has levels 0 to {last}")
            found.append(Level(environment, one))
    return found


def play_config(subject: Subject, options: Options) -> PlayConfig:
    """As the run plays, or with as many turns as the environments have."""
    if (rollout := _rollout(subject)) is not None:
        return options.play(rollout)
    turns = max(level.environment.max_turns for level in levels_of(subject, options))
    return options.play(dataclasses.replace(_FALLBACK, max_turns=turns))


def measure(context: Context, options: Options) -> Result:
    """Every task played `k` times to its end, sampled as the run samples."""
    config = play_config(context.subject, options)
    seed = context.subject.config.seed if context.subject.config else 0
    tasks = [
        level.task(seed, index)
        for level in levels_of(context.subject, options)
        for index in range(options.tasks)
    ]
    rollout = _rollout(context.subject)
    together = rollout.prompts * rollout.generations if rollout else SIDE_BY_SIDE
    size = max(1, together // options.k)
    for start in range(0, len(tasks), size):
        context.progress.at(start, len(tasks), "tasks")
        part = tasks[start : start + size]
        # With seed 0 and one sample of each task the draws are those of a run's result.json.
        draws = np.random.SeedSequence([seed + 1 + context.seed, start]).generate_state(1)
        draws = int(draws[0]) >> 1
        if context.url is not None:
            _play_behind_url(context, part, config, options.k, draws)
            continue
        with contextlib.closing(Here()) as players:
            episodes = play_episodes(
                context.model,
                context.tokenizer,
                players,
                part,
                config,
                sampler=context.sampler,
                seed=draws,
                copies=options.k,
                execution=context.execution,
            )
        for place, episode in enumerate(episodes):
            _keep(context, episode, sample=place % options.k, seed=draws)
    return summarise(context.transcripts.lines, options)


def _keep(context: Context, episode: Episode, *, sample: int, seed: int) -> None:
    spoken = sum(turn.stop - turn.start for turn in episode.turns)
    answer = Answer(
        text=_last_text(episode.messages, len(episode.task.messages)),
        tokens=spoken,
        finish_reason="length" if episode.truncated else "stop",
        error=episode.verdict.infra_error or "",
    )
    score = Score(episode.verdict.reward, _reason(episode), bool(episode.turns))
    _add(context, episode.task, answer, episode.messages, sample=sample, seed=seed, score=score)


def _reason(episode: Episode) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in episode.verdict.parts.items())
    return parts or ("right" if episode.verdict.reward == 1 else "wrong")


def _add(
    context: Context,
    task: Task,
    answer: Answer,
    messages: Sequence[dict],
    *,
    sample: int,
    seed: int,
    score: Score | None = None,
) -> None:
    context.transcripts.add(
        answer,
        task=task.id,
        index=task.index,
        gold=Turn.of(find(task.environment).oracle(task)[-1]).text,
        messages=messages,
        sample=sample,
        seed=seed,
        score=score,
        environment=task.environment,
        level=task.level,
        task_seed=task.seed,
        opening=len(task.messages),
    )


def _play_behind_url(
    context: Context, tasks: Sequence[Task], config: PlayConfig, k: int, seed: int
) -> None:
    """Play each task `k` times with a server, which is asked for one turn of all episodes that go
    on at a time, and note them."""
    with contextlib.ExitStack() as stack:
        played = [task for task in tasks for _ in range(k)]
        sessions = [stack.enter_context(find(t.environment).start(t)) for t in played]
        talks: list[list[dict]] = [list(task.messages) for task in played]
        totals = [Answer() for _ in played]
        going = list(range(len(played)))
        for turn in range(config.max_turns):
            asks = [_ask(talks[n], played[n], config, seed + n + turn) for n in going]
            answers = context.ask(asks)
            for n, answer in zip(going, answers, strict=True):
                spoken = totals[n].tokens + answer.tokens
                totals[n] = dataclasses.replace(answer, tokens=spoken)
                if answer.error:
                    continue
                talks[n].append(answer.message)
                talks[n] += sessions[n].reply(answer.message)
            ends = lambda n: sessions[n].over or totals[n].finish_reason != "stop"
            going = [n for n in going if not ends(n)]
            if not going:
                break
        for n, (task, total) in enumerate(zip(played, totals, strict=True)):
            verdict = sessions[n].verify()
            total = dataclasses.replace(
                total,
                text=_last_text(talks[n], len(task.messages)),
                error=total.error or verdict.infra_error or "",
                calls=(),
                reasoning="",
            )
            score = Score(verdict.reward, "right" if verdict.reward == 1 else "wrong")
            _add(context, task, total, talks[n], sample=n % k, seed=seed, score=score)


def _ask(talk: Sequence[dict], task: Task, config: PlayConfig, seed: int) -> Ask:
    return Ask(
        messages=tuple(talk),
        tools=task.tools,
        max_new_tokens=config.max_turn_tokens,
        temperature=config.temperature,
        seed=seed,
        thinking=config.thinking,
        budget=config.budget,
    )


def score(line: Line) -> Score:
    """The verdict on the turns that a line holds, played again."""
    environment = find(line["environment"])
    seed, index = line["task_seed"], line["index"]
    task = environment.split(seed, "held_out", index, level=line["level"])
    turns = [m for m in line["messages"][line["opening"] :] if m["role"] == "assistant"]
    verdict = play(environment, task, turns)
    if verdict.infra_error:
        raise Unavailable(f"{line['task']}: {verdict.infra_error}")
    return Score(verdict.reward, line.get("reason", ""), bool(turns))


def summarise(lines: Sequence[Line], options: Options) -> Result:
    """Mean reward, pass@1, and with several samples pass@k and pass^k: of all, and by level."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(f"{line['environment']}/level{line['level']}", []).append(line)
    if not items_of(lines):
        reasons = sorted({line["reason"] for line in lines})
        raise Unavailable(f"no task could be judged: {'; '.join(reasons[:2])}")
    values = {"reward": value_over(items_of(lines), unit="share")}
    values |= pass_values(lines, options.k, unit="share")
    rows, curves = [], {}
    for name, part in groups.items():
        if not (items := items_of(part)):
            continue
        mean = value_over(items, unit="share")
        solved = value_over(pass_items(part, 1), unit="share")
        values[f"reward/{name}"], values[f"pass@1/{name}"] = mean, solved
        low, high = mean.interval or (None, None)
        environment, level = part[0]["environment"], part[0]["level"]
        tokens = math.fsum(line["tokens"] for line in part) / len(part)
        rows.append((environment, level, mean.n, mean.mean, low, high, solved.mean, tokens))
        curves.setdefault(environment, []).append((float(level), mean.mean, low, high))
    return Result(
        values,
        counts_of(lines),
        tables=(Table("By environment and level", COLUMNS, tuple(rows)),),
        plots=(
            Plot(
                name="reward_by_level",
                title="Mean reward on held-out tasks by level",
                x_label="level (0 is the easiest)",
                y_label="mean reward",
                curves=curves,
            ),
        ),
        headline=("reward",),
    )


def _last_text(messages: Sequence[dict], opening: int) -> str:
    """What the model said last."""
    own = [m for m in messages[opening:] if m["role"] == "assistant"]
    return str(own[-1].get("content") or "") if own else ""


def _rollout(subject: Subject) -> RolloutConfig | None:
    """How the run itself plays, where it learns from rewards."""
    rollout = subject.config and subject.config.rl.rollout
    return rollout if rollout and rollout.environments else None


def _ready(subject: Subject, options: Options) -> None:
    levels_of(subject, options)
    if not subject.url:
        subject.tokenizer  # noqa: B018  # one that is not there is an error


def _longest(subject: Subject, options: Options) -> int:
    return play_config(subject, options).max_tokens


SUITE = Suite(
    name="environments",
    about="which held-out tasks of verified environments are solved",
    options=Options,
    measure=measure,
    needs="either",
    ready=_ready,
    longest=_longest,
    untrained=lambda options: dataclasses.replace(options, tasks=min(options.tasks, 16), k=1),
    score=score,
    summarise=summarise,
)
