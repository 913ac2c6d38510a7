"""Stage `grpo`: fine-tuning first where it is asked for, then learning from rewards."""

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.conversations import PATTERNS
from nemotron_jax.files import atomic_writer
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.conversations import make_sampler
from nemotron_jax.playing.workers import make_players
from nemotron_jax.posttraining import rl_loop
from nemotron_jax.posttraining.curriculum import make_pools, pool_settings
from nemotron_jax.posttraining.grpo import grpo_objective
from nemotron_jax.posttraining.plots import draw_result
from nemotron_jax.posttraining.result import result, summary
from nemotron_jax.posttraining.result_file import read_result
from nemotron_jax.posttraining.rl_loop import Pay, shaped_rewards
from nemotron_jax.posttraining.sandboxes import check_sandboxes, sandbox_lines
from nemotron_jax.posttraining.success import pool_plays, success_of_tasks
from nemotron_jax.posttraining.transcripts import Transcripts, write_page
from nemotron_jax.pretrained import begin_run, data_of, load_pretrained, load_tokenizer
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.stages import sft
from nemotron_jax.training import loop
from nemotron_jax.training.coverage import coverage
from nemotron_jax.training.metrics import read_records
from nemotron_jax.training.prepared import Prepared, prepare_run


def run(
    config: RunConfig, directory: RunDirectory, mesh: Mesh, *, pay: Pay = shaped_rewards
) -> int:
    """Train in the directory's parts `sft` and `grpo`, and write down what that has changed.

    Whatever is done already is not done again, the result of as many steps and tasks included; its
    seconds are those of the process that came to the end. `pay` is what episodes are worth. Gives
    the exit status.
    """
    clock = Clock()
    _check(config, directory)
    objective = functools.partial(grpo_objective, config.rl, config.training.loss_chunk)
    prepared = prepare_run(config, directory.part("grpo"), objective=objective)
    if line := coverage(config.model, config.lora):
        print(f"note: {line}")
    if (found := finished(config, directory)) is not None:
        print(summary(found, directory))
        return 0
    if (start := fine_tuned(config, directory, mesh)) is None:
        return 0  # stopped by a signal
    with jax.set_mesh(mesh):
        if not _reinforce(prepared, start, mesh, pay):
            return 0  # stopped by a signal
    compare(config, directory, start, mesh, clock)
    return 0


class Clock:
    """Seconds of this process since the clock was made."""

    def __init__(self) -> None:
        self._began, self._cpu_began = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        """`seconds`, and those of all threads together, `cpu_seconds`."""
        cpu_seconds = time.process_time() - self._cpu_began
        return {"seconds": time.monotonic() - self._began, "cpu_seconds": cpu_seconds}


def finished(config: RunConfig, directory: RunDirectory) -> dict[str, Any] | None:
    """The result that is there already, of as many steps and tasks."""
    found = read_result(directory.result)
    return found if found and _extent(config).items() <= found.items() else None


def fine_tuned(config: RunConfig, directory: RunDirectory, mesh: Mesh) -> str | None:
    """The directory whose model learns from rewards, once its fine-tuning is done, if it is to have
    some; None where a signal stopped that.

    What counts is the checkpoint that its model would be read from: where a newer one is damaged,
    the steps up to that are taken again, which give the same model.
    """
    if config.warm_start is None:
        return config.init_from
    first, part = config.warm_start_run, directory.part("sft")
    done, newest = part.whole_step(), max(part.steps(), default=0)
    if done < first.training.steps:
        if newest > done:
            print(f"note: {part.path}: step {newest} is damaged; going on from step {done}")
        sft.run(first, part, mesh)
        done = part.whole_step()  # a signal may have stopped it before the damaged step
    return str(part.path) if done >= first.training.steps else None


def compare(
    config: RunConfig, directory: RunDirectory, start: str, mesh: Mesh, clock: Clock
) -> None:
    """Play held-out tasks with the model that a run began with and with its last one, and write
    down, draw and print what has changed."""
    part, tokenizer = directory.part("grpo"), load_tokenizer(start)
    with jax.set_mesh(mesh):
        execution = config.execution.at_step(config.training.steps - 1)
        before, after = (
            load_pretrained(path, mesh=mesh, layout="training") for path in (start, part.path)
        )
        found = result(before, after, tokenizer, config.rl, config.seed, execution)
    ended = _began_with(before) | _extent(config) | clock.read()
    with atomic_writer(directory.result) as out:
        out.write((json.dumps(found | ended, indent=1) + "\n").encode())
    draw_result(found, read_records(part.metrics)[0], directory)
    print(summary(found, directory))


def _extent(config: RunConfig) -> dict[str, int]:
    return {"steps": config.training.steps, "result_tasks": config.rl.result_tasks}


def _began_with(model: Nemotron) -> dict[str, str]:
    """The name of the model's checkpoint: of a run whose newest is damaged it is an older one."""
    return {"start": Path(model.origin.directory).name} if model and model.origin else {}


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
    rl_loop.check_rollouts(config)
    check_sandboxes(config.rl.rollout)
    directory.check_names()
    _check_prompts(config, directory.part("sft"))


def _check_prompts(config: RunConfig, first: RunDirectory) -> None:
    """Raise ValueError where no prompt leaves room to answer, as far as the tokenizer is known."""
    check = functools.partial(rl_loop.check_prompts, config.rl.rollout, config.seed)
    if config.warm_start is None:
        check(load_tokenizer(config.init_from))
        return
    name = data_of(config.warm_start.data, config.init_from, first).tokenizer
    if first.tokenizer.exists():
        name = str(first.path)
    check(PATTERNS[name] if name in PATTERNS else load_tokenizer(name))


def _reinforce(run: Prepared, start: str, mesh: Mesh, pay: Pay) -> bool:
    """Learn from rewards up to the last step; False where a signal stopped it."""
    config, directory = run.config, run.directory
    tokenizer, rollout = load_tokenizer(start), config.rl.rollout
    rl_loop.check_prompts(rollout, config.seed, tokenizer)
    directory.path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory.path)
    for line in sandbox_lines(rollout):
        print(line)
    first = functools.cache(lambda: load_pretrained(start, mesh=mesh, layout="training"))
    players, sampler = make_players(rollout), make_sampler(rollout)
    play = pool_plays(
        first,
        tokenizer,
        rollout,
        config.seed,
        players=players,
        sampler=sampler,
        execution=config.execution.at_step(0),
    )
    rollouts = rl_loop.Rollouts(
        config,
        tokenizer,
        sampler=sampler,
        players=players,
        reference=first() if config.rl.objective.kl_weight else None,
        pools=make_pools(config.rl, config.seed, play, directory, of=pool_settings(config)),
        pay=pay,
        on_episodes=Transcripts(directory, config.rl.transcripts, thinking=rollout.thinking).add,
    )
    with contextlib.closing(rollouts):
        outcome = loop.run(
            run,
            data=rollouts,
            probes=[success_of_tasks(tokenizer, config.rl, config.seed, sampler)],
            begin=lambda run: begin_run(run, start),
        )
    write_page(directory)
    return outcome.finished
