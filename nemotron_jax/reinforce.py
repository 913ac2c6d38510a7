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
from nemotron_jax.data.atomic import atomic_writer
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.posttraining import rl_loop
from nemotron_jax.posttraining.curriculum import make_pools
from nemotron_jax.posttraining.engine_sampler import make_sampler
from nemotron_jax.posttraining.grpo import grpo_objective
from nemotron_jax.posttraining.plots import draw_result
from nemotron_jax.posttraining.result import result, summary
from nemotron_jax.posttraining.transcripts import Transcripts, write_page
from nemotron_jax.posttraining.workers import make_players
from nemotron_jax.pretrained import begin_run, load_pretrained, load_tokenizer
from nemotron_jax.training import loop
from nemotron_jax.training.checkpoint import checkpoint_steps
from nemotron_jax.training.metrics import FILE_NAME as METRICS

SFT, GRPO, RESULT = "sft", "grpo", "result.json"


def run(
    config: RunConfig, workdir: Path, mesh: Mesh, *, fine_tune: Callable[[RunConfig, Path], int]
) -> int:
    """Train in workdir/sft and workdir/grpo; write workdir/result.json and plots/result.png.

    Whatever is done already is not done again, the result of as many steps and tasks included; its
    seconds are those of the process that came to the end. `fine_tune` trains a run of stage `sft`.
    Gives the exit status.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    if (count := jax.process_count()) > 1:
        raise ValueError(
            f"RunConfig.stage='grpo': there are {count} processes of jax, and episodes are played "
            "by one; start one process that drives all devices"
        )
    rl_loop.check_rollouts(config)
    loop.check_run(config, workdir / GRPO)
    if (found := _finished(config, workdir / RESULT)) is not None:
        print(summary(found, workdir))
        return 0
    start = config.init_from
    if config.warm_start is not None:
        start, first = str(workdir / SFT), warm_start_run(config)
        done = checkpoint_steps(workdir / SFT / "checkpoints")
        if not done or done[-1] < first.training.steps:
            fine_tune(first, workdir / SFT)
            done = checkpoint_steps(workdir / SFT / "checkpoints")
        if not done or done[-1] < first.training.steps:
            return 0  # stopped by a signal
    if not start:
        raise ValueError(
            "RunConfig.warm_start=None: reinforcement learning begins with a model that can play; "
            "set warm_start or init_from"
        )
    tokenizer = load_tokenizer(start)
    if config.rl.rollout.rewards == "demonstrations":
        fine_tune(longer_run(config, start), workdir / GRPO)
    else:
        with jax.set_mesh(mesh):
            _reinforce(config, workdir / GRPO, tokenizer, start, mesh)
    done = checkpoint_steps(workdir / GRPO / "checkpoints")
    if not done or done[-1] < config.training.steps:
        return 0  # stopped by a signal
    with jax.set_mesh(mesh):
        before, after = (load_pretrained(path, mesh=mesh) for path in (start, workdir / GRPO))
        found = result(before, after, tokenizer, config)
    ended = _extent(config) | {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
    }
    with atomic_writer(workdir / RESULT) as out:
        out.write((json.dumps(found | ended, indent=1) + "\n").encode())
    lines = (workdir / GRPO / METRICS).read_text("utf-8").splitlines()
    draw_result(found, [json.loads(line) for line in lines], workdir)
    print(summary(found, workdir))
    return 0


def _finished(config: RunConfig, path: Path) -> dict[str, Any] | None:
    """The result that is there already, of as many steps and tasks."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found if _extent(config).items() <= found.items() else None


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
    config: RunConfig, workdir: Path, tokenizer: Tokenizer, start: str, mesh: Mesh
) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir)
    first = functools.cache(lambda: load_pretrained(start, mesh=mesh))
    rollout = config.rl.rollout
    rates = lambda tasks: rl_loop.success_rates(first(), tokenizer, config)(tasks)
    rollouts = rl_loop.Rollouts(
        config,
        tokenizer,
        sampler=make_sampler(rollout),
        players=make_players(rollout),
        reference=first() if config.rl.objective.kl_weight else None,
        pools=make_pools(config, rates, workdir / "pools.json"),
        on_episodes=Transcripts(workdir, config.rl.transcripts, thinking=rollout.thinking).add,
    )
    with contextlib.closing(rollouts):
        loop.run(
            config,
            workdir,
            data=rollouts,
            evaluators=[rl_loop.success_of_tasks(tokenizer, config)],
            begin=lambda config: begin_run(dataclasses.replace(config, init_from=start)),
            objective=grpo_objective,
        )
    write_page(workdir)
