"""Arms beside a run of stage grpo: what is left of its gain without rewards, or without play."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from experiments.carried_over import carried_over
from experiments.harness import Measured
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.config.run import RunConfig, ScheduleConfig
from nemotron_jax.files import atomic_writer
from nemotron_jax.playing.conversations import make_sampler
from nemotron_jax.playing.rollout import Episode
from nemotron_jax.posttraining.curriculum import training_task
from nemotron_jax.posttraining.result_file import read_result
from nemotron_jax.posttraining.rl_loop import shaped_rewards
from nemotron_jax.posttraining.success import play_tasks_once
from nemotron_jax.posttraining.transcripts import transcript
from nemotron_jax.pretrained import load_pretrained, load_tokenizer
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.stages import grpo, sft
from nemotron_jax.training.metrics import read_records

RIGHT = 0.5  # rewards above it are those of right episodes
_OWN_DRAW = 1_000  # of the plays of an arm's own samples: far from those of evaluations and pools


def earned(config: RunConfig, directory: Path, before: Path | None) -> Measured | None:
    """What train.py does."""
    run = RunDirectory(directory)
    grpo.run(config, run, _mesh(config))
    return _measured(config, run)


def permuted(config: RunConfig, directory: Path, before: Path | None) -> Measured | None:
    """Learning from rewards that say nothing."""
    run = _begun(directory, before)
    grpo.run(config, run, _mesh(config), pay=dealt_out)
    return _measured(config, run)


def fine_tuned(config: RunConfig, directory: Path, before: Path | None) -> Measured | None:
    """The warm start's own fine-tuning for as many more tokens, at its last learning rate."""
    run = _begun(directory, before)
    return _fine_tuned(config, run, longer_run(config, str(run.part("sft").path)))


def own_right_samples(config: RunConfig, directory: Path, before: Path | None) -> Measured | None:
    """Fine-tuning for as many tokens on what the first model plays right, of as many episodes."""
    run = _begun(directory, before)
    file = run.path / "right.jsonl"
    if not file.exists():
        _write_right_episodes(config, run, file)
    longer = longer_run(config, str(run.part("sft").path))
    data = dataclasses.replace(longer.data, sources=(f"messages:{file}",), source_weights=(1.0,))
    return _fine_tuned(config, run, dataclasses.replace(longer, data=data))


def dealt_out(
    episodes: Sequence[Episode], config: RolloutConfig, seed: int, number: int
) -> Float[np.ndarray, "N"]:
    """The rewards of a batch, those that count dealt out at random."""
    paid = shaped_rewards(episodes, config, seed, number)
    counted = np.flatnonzero([episode.counted for episode in episodes])
    order = np.random.default_rng([seed, number, 2]).permutation(counted)
    paid[counted] = paid[order]
    return paid


def longer_run(config: RunConfig, start: str) -> RunConfig:
    """Fine-tuning on as many more tokens of rows as the run learns from rewards with."""
    first = config.warm_start_run
    step = first.data.batch_size * first.data.sequence_length
    learned = config.training.steps * config.data.batch_size * config.data.sequence_length
    rate, steps = first.training.schedule.final_learning_rate, round(learned / step)
    tokens = steps * step
    training = dataclasses.replace(
        first.training, steps=steps, schedule=ScheduleConfig(rate, rate, 0, 0, tokens)
    )
    data = dataclasses.replace(first.data, tokenizer=start)
    return dataclasses.replace(first, training=training, data=data, init_from=start)


def _mesh(config: RunConfig) -> Mesh:
    return make_mesh(config.mesh, jax.devices())


def _begun(directory: Path, before: Path) -> RunDirectory:
    """The run's directory, which begins with the fine-tuned model of another arm's."""
    run = RunDirectory(directory)
    if not run.path.exists():
        partial = RunDirectory(directory.with_name(f".{directory.name}"))  # as a kill leaves it
        shutil.rmtree(partial.path, ignore_errors=True)
        shutil.copytree(RunDirectory(before).part("sft").path, partial.part("sft").path)
        partial.path.rename(run.path)
    return run


def _fine_tuned(config: RunConfig, run: RunDirectory, longer: RunConfig) -> Measured | None:
    """What fine-tuning makes of the run's own start, played as the run is."""
    clock, mesh, part = grpo.Clock(), _mesh(config), run.part("grpo")
    if grpo.finished(config, run) is None:
        sft.run(longer, part, mesh)
        if part.whole_step() == longer.training.steps:
            grpo.compare(config, run, longer.init_from, mesh, clock)
    return _measured(config, run)


def _write_right_episodes(config: RunConfig, run: RunDirectory, file: Path) -> None:
    """Conversations that the first model plays right, of the tasks that the run learns from."""
    start, rollout = run.part("sft").path, config.rl.rollout
    count = config.training.steps * rollout.prompts
    names = rollout.environments
    tasks = [
        training_task(name, config.seed, number)
        for name in names
        for number in range(count // len(names))
        for _ in range(rollout.generations)
    ]
    model, tokenizer = load_pretrained(start), load_tokenizer(start)
    played = play_tasks_once(
        model,
        tokenizer,
        rollout,
        tasks,
        seed=config.seed + _OWN_DRAW,
        sampler=make_sampler(rollout),
        execution=config.execution.at_step(0),
    )
    right = [e for e in played if e.counted and e.reward > RIGHT]
    if not right:
        raise ValueError(
            f"own_right_samples: the model of {start} plays none of {len(tasks)} tasks right; "
            "begin with one that knows some"
        )
    rows = [transcript(0, e, e.reward, thinking=rollout.thinking) for e in right]
    with atomic_writer(file) as out:
        out.writelines((json.dumps(row) + "\n").encode() for row in rows)


def _measured(config: RunConfig, run: RunDirectory) -> Measured | None:
    """A finished run as evidence; None before its end.

    The curve of an arm that is fine-tuned has two points: its evaluations play other tasks.
    """
    found = read_result(run.result)
    if found is None:
        return None
    records = read_records(run.part("grpo").metrics)[0]
    earns = any("reward" in record for record in records)
    curve = [[r["step"], r["success"]] for r in records if earns and r.get("success") is not None]
    steps, tokens = (records[-1][name] if records else 0 for name in ("step", "tokens"))
    ends = [[0, found["before"]]], [] if earns else [[steps, found["after"]]]
    more = {"result": found, "entropy": _column(records, "surprise"), **_known(config, run)}
    return Measured(steps, ends[0] + curve + ends[1], found["after"], tokens, more)


def _column(records: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    return [[record["step"], record[name]] for record in records if name in record]


def _known(config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """What the run's first and last models know beside its result."""
    tokenizer, found = load_tokenizer(run.part("sft").path), {}
    execution = config.execution.at_step(0)
    for when, part in (("known_before", "sft"), ("known_after", "grpo")):
        model = load_pretrained(run.part(part).path)
        found[when] = carried_over(model, tokenizer, config.rl.rollout, execution)
    return found
