"""Stage `grpo` of a run: fine-tuning first where it is asked for, then reinforcement learning."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nemotron_jax.config.run import RunConfig, ScheduleConfig
from nemotron_jax.data.conversations import PATTERNS
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.files import atomic_writer
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.engine_sampler import make_sampler
from nemotron_jax.playing.workers import make_players
from nemotron_jax.posttraining import rl_loop
from nemotron_jax.posttraining.curriculum import make_pools
from nemotron_jax.posttraining.grpo import grpo_objective
from nemotron_jax.posttraining.plots import draw_result
from nemotron_jax.posttraining.result import result, summary
from nemotron_jax.posttraining.result_file import read_result
from nemotron_jax.posttraining.sandboxes import check_sandboxes, sandbox_lines
from nemotron_jax.posttraining.transcripts import Transcripts, write_page
from nemotron_jax.pretrained import begin_run, data_of, load_pretrained, load_tokenizer
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import loop
from nemotron_jax.training.metrics import read_records
from nemotron_jax.training.prepared import prepare_run

SFT, GRPO = "sft", "grpo"


def run(
    config: RunConfig,
    workdir: Path,
    mesh: Mesh,
    *,
    fine_tune: Callable[[RunConfig, Path], int],
    schedules_follow: bool = False,
) -> int:
    """Train in workdir/sft and workdir/grpo; write workdir/result.json and plots/result.png.

    Whatever is done already is not done again, the result of as many steps and tasks included; its
    seconds are those of the process that came to the end. `fine_tune` trains a run of stage `sft`.
    `schedules_follow`: none was chosen, so that either part that goes on keeps its own.
    Gives the exit status.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    whole = RunDirectory(workdir)
    directory = whole.part(GRPO)
    config = with_saved_schedules(config, whole) if schedules_follow else config
    _check(config, whole)
    if (found := _finished(config, whole.result)) is not None:
        print(summary(found, whole))
        return 0
    if config.warm_start is not None and not _fine_tuned(config, whole.part(SFT), fine_tune):
        return 0  # stopped by a signal
    start = _start(config, whole)
    tokenizer = load_tokenizer(start)
    if _demonstrates(config):
        fine_tune(_longer(config, whole), directory.path)
    else:
        rl_loop.check_prompts(config, tokenizer)
        with jax.set_mesh(mesh):
            _reinforce(config, directory, tokenizer, start, mesh)
    done = directory.steps()
    if not done or done[-1] < config.training.steps:
        return 0  # stopped by a signal
    with jax.set_mesh(mesh):
        before, after = (load_pretrained(path, mesh=mesh) for path in (start, directory.path))
        found = result(before, after, tokenizer, config)
    ended = (
        _began_with(before)
        | _extent(config)
        | {
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - cpu_began,
        }
    )
    with atomic_writer(whole.result) as out:
        out.write((json.dumps(found | ended, indent=1) + "\n").encode())
    draw_result(found, read_records(directory.metrics)[0], whole)
    print(summary(found, whole))
    return 0


def with_saved_schedules(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The run with the schedules that its parts were begun with, where only their steps changed."""
    if config.warm_start is not None:
        first = directory.part(SFT).with_saved_schedule(warm_start_run(config))
        warm_start = dataclasses.replace(config.warm_start, training=first.training)
        config = dataclasses.replace(config, warm_start=warm_start)
    return config if _demonstrates(config) else directory.part(GRPO).with_saved_schedule(config)


def _check(config: RunConfig, directory: RunDirectory) -> None:
    """Raise ValueError for what cannot be run here, before anything is trained."""
    if (count := jax.process_count()) > 1:
        raise ValueError(
            f"RunConfig.stage='grpo': there are {count} processes of jax, and episodes are played "
            "by one; start one process that drives all devices"
        )
    if config.warm_start is None and not config.init_from:
        raise ValueError(
            "RunConfig.warm_start=None: reinforcement learning begins with a model that can play; "
            "set warm_start or init_from"
        )
    if config.warm_start is None and _demonstrates(config):
        raise ValueError(
            "RolloutConfig.rewards='demonstrations': goes on with the fine-tuning of a warm start, "
            "and warm_start is None; set it, or rl.rollout.rewards=earned"
        )
    rl_loop.check_rollouts(config)
    check_sandboxes(config.rl.rollout)
    directory.check_names()
    if not _demonstrates(config):
        _check_prompts(config, directory.part(SFT))
    part = _longer(config, directory) if _demonstrates(config) else config
    directory.part(GRPO).check(part)


def _check_prompts(config: RunConfig, first: RunDirectory) -> None:
    """Raise ValueError where no prompt leaves room to answer, as far as the tokenizer is known."""
    if config.warm_start is None:
        rl_loop.check_prompts(config, load_tokenizer(config.init_from))
        return
    name = data_of(warm_start_run(config), first).tokenizer
    if first.tokenizer.exists():
        name = str(first.path)
    rl_loop.check_prompts(config, PATTERNS[name] if name in PATTERNS else load_tokenizer(name))


def _start(config: RunConfig, directory: RunDirectory) -> str:
    """The directory whose model reinforcement learning begins with."""
    return config.init_from if config.warm_start is None else str(directory.part(SFT).path)


def _began_with(model: Nemotron) -> dict[str, str]:
    """The name of the model's checkpoint: of a run whose newest is damaged it is an older one."""
    return {"start": Path(model.origin.directory).name} if model and model.origin else {}


def _demonstrates(config: RunConfig) -> bool:
    return config.rl.rollout.rewards == "demonstrations"


def _longer(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The control's run; its rate is the same at every step, however many they are."""
    longer = longer_run(config, _start(config, directory))
    return directory.part(GRPO).with_saved_schedule(longer)


def _fine_tuned(
    config: RunConfig, directory: RunDirectory, fine_tune: Callable[[RunConfig, Path], int]
) -> bool:
    """Whether the warm start is there to its last step; it is trained where it is not.

    What counts is the checkpoint that its model would be read from: where a newer one is damaged,
    the steps up to that are taken again, which give the same model.
    """
    first = warm_start_run(config)
    done, newest = directory.whole_step(), max(directory.steps(), default=0)
    if done < first.training.steps:
        if newest > done:
            print(f"note: {directory.path}: step {newest} is damaged; going on from step {done}")
        fine_tune(first, directory.path)
        done = directory.whole_step()  # a signal may have stopped it before the damaged step
    return done >= first.training.steps


def _finished(config: RunConfig, path: Path) -> dict[str, Any] | None:
    """The result that is there already, of as many steps and tasks."""
    found = read_result(path)
    return found if found and _extent(config).items() <= found.items() else None


def _extent(config: RunConfig) -> dict[str, int]:
    return {"steps": config.training.steps, "result_tasks": config.rl.result_tasks}


def warm_start_run(config: RunConfig) -> RunConfig:
    """The fine-tuning run that comes before."""
    first = config.warm_start
    sft = {"stage": "sft", "training": first.training, "data": first.data, "warm_start": None}
    sft |= {"lora": config.lora if first.training.trains == "lora" else None}
    return dataclasses.replace(config, **sft)


def longer_run(config: RunConfig, start: str) -> RunConfig:
    """The control without rewards: as many more steps of fine-tuning, at its last learning rate."""
    first = warm_start_run(config)
    rate, steps = first.training.schedule.final_learning_rate, config.training.steps
    tokens = steps * first.data.batch_size * first.data.sequence_length
    training = dataclasses.replace(
        first.training, steps=steps, schedule=ScheduleConfig(rate, rate, 0, 0, tokens)
    )
    data = dataclasses.replace(first.data, tokenizer=start)
    return dataclasses.replace(first, training=training, data=data, init_from=start)


def _reinforce(
    config: RunConfig, directory: RunDirectory, tokenizer: Tokenizer, start: str, mesh: Mesh
) -> None:
    directory.path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory.path)
    first = functools.cache(lambda: load_pretrained(start, mesh=mesh))
    rollout = config.rl.rollout
    for line in sandbox_lines(rollout):
        print(line)
    players = make_players(rollout)
    play = rl_loop.pool_plays(first, tokenizer, config, players)
    rollouts = rl_loop.Rollouts(
        config,
        tokenizer,
        sampler=make_sampler(rollout),
        players=players,
        reference=first() if config.rl.objective.kl_weight else None,
        pools=make_pools(config, play, directory),
        on_episodes=Transcripts(directory, config.rl.transcripts, thinking=rollout.thinking).add,
    )
    objective = functools.partial(grpo_objective, config.rl, config.training.loss_chunk)
    with contextlib.closing(rollouts):
        loop.run(
            prepare_run(config, directory, objective=objective),
            data=rollouts,
            evaluators=[rl_loop.success_of_tasks(tokenizer, config)],
            begin=lambda run: begin_run(run, start),
        )
    write_page(directory)
