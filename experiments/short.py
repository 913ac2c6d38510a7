"""A model that is pre-trained in a minute or two, and runs that go on from it."""

import dataclasses
import functools
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

from experiments import pretraining
from experiments.harness import Measured
from nemotron_jax import host
from nemotron_jax.config.run import RunConfig, ScheduleConfig
from nemotron_jax.run_directory import RunDirectory

VOCABULARY, TOKENS_PER_ROW = 512, 128


def start(seed: int, steps: int) -> RunConfig:
    """The tiny model with a small vocabulary and short rows: the start of an experiment's arms."""
    config = pretraining.base(seed, steps)
    halved = TOKENS_PER_ROW / config.data.sequence_length
    schedule = config.training.schedule
    names = ("warmup_tokens", "decay_tokens", "total_tokens")
    fewer = {name: round(getattr(schedule, name) * halved) for name in names}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=VOCABULARY),
        data=dataclasses.replace(config.data, sequence_length=TOKENS_PER_ROW),
        training=dataclasses.replace(
            config.training, schedule=dataclasses.replace(schedule, **fewer)
        ),
    )


def gone_on(config: RunConfig, before: Path, steps: int, rate: float) -> RunConfig:
    """A run of so many steps from another's end, on the same text: it warms up for a tenth of them
    and falls to a tenth of its rate over the last half."""
    step = config.data.batch_size * config.data.sequence_length
    schedule = ScheduleConfig(
        peak_learning_rate=rate,
        final_learning_rate=rate / 10,
        warmup_tokens=steps // 10 * step,
        decay_tokens=steps // 2 * step,
        total_tokens=steps * step,
    )
    logging = dataclasses.replace(
        config.logging,
        log_every=max(1, min(10, steps // 6)),
        evaluate_every=max(1, steps // 6),
        checkpoint_every=max(1, steps // 2),
    )
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=steps, schedule=schedule),
        logging=logging,
        init_from=str(before),
    )


def arm(
    module: str, name: str, lengths: tuple[int, int]
) -> Callable[[int, Path, Path | None], Measured | None]:
    """Runs `name(lengths, seed, directory, before)` of a module, in a process of its own.

    `lengths` are the steps of pre-training, and those after it.
    """
    return functools.partial(_run, module, name, lengths)


def _run(
    module: str,
    name: str,
    lengths: tuple[int, int],
    seed: int,
    directory: Path,
    before: Path | None,
) -> Measured | None:
    host.keep_compiled_programs()
    host.show_cpu_devices(1)
    share_text(directory)
    # jax reads the environment when it is imported; the process that starts runs needs none.
    return getattr(importlib.import_module(module), name)(lengths, seed, directory, before)


def share_text(directory: Path) -> None:
    """The tokenizer and the tokens of a run beside this one, where there are some: all read the
    same text, and making them takes as long as many steps."""
    run = RunDirectory(directory)
    whole = lambda other: (other.corpus / "manifest.json").exists()  # which is written last
    beside = [RunDirectory(path) for path in sorted(directory.parent.glob("*-*"))]
    first = next((other for other in beside if whole(other)), None)
    if first is None or run.corpus.exists():
        return
    run.path.mkdir(parents=True, exist_ok=True)
    shutil.copy(first.tokenizer, run.tokenizer)
    partial = run.path / ".corpus"  # as a kill leaves it
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(first.corpus, partial)
    partial.rename(run.corpus)
