"""The training loop: steps, reports, evaluations, checkpoints; it goes on where a run stopped."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from nemotron_jax import distributed, host
from nemotron_jax.config.convert import to_json
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data import companions
from nemotron_jax.files import atomic_writer
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import place_batch
from nemotron_jax.training.checkpoint import Checkpoints
from nemotron_jax.training.metrics import Record
from nemotron_jax.training.prepared import Prepared, place_state
from nemotron_jax.training.report import Probe, Reporter, Samples
from nemotron_jax.training.signals import StopSignal, sole_owner
from nemotron_jax.training.state import TrainState
from nemotron_jax.training.step import Metrics, compile_train_step
from nemotron_jax.types import Batch


class Loader(Protocol):
    """Batches of a run, whose position can be saved: data.loader.TrainLoader, or another."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """Where the loader stands, as JSON can hold it: saved with a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a loader with this state stood."""


@runtime_checkable
class ModelLoader(Protocol):
    """Batches that are made with the model as it stands, and what is to be said of the last one."""

    def next_with(self, model: Nemotron) -> Any:
        """The batch of the next step, made with the model as it is now."""

    def report(self) -> Mapping[str, float]:
        """What the step's record says of that batch."""

    def state(self) -> dict[str, Any]:
        """Where the loader stands, as JSON can hold it: saved with a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a loader with this state stood."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far a run is, and what it has written down."""

    step: int
    finished: bool  # False where a signal stopped it
    records: tuple[Record, ...]
    model: Nemotron


class TrainingStopped(FloatingPointError):
    """Too many steps in a row had a non-finite loss or gradient."""


def run(
    run: Prepared,
    *,
    data: Loader | ModelLoader,
    probes: Sequence[Probe] = (),
    samples: Samples | None = None,
    final: Probe | None = None,
    begin: Callable[[Prepared], TrainState] = place_state,
) -> Outcome:
    """Train up to `config.training.steps` in a run's directory, from its newest checkpoint on.

    `probes` give values of the model, run as the step runs it, for the record of every
    evaluation, `samples` a text; `final` gives values of the last model, which its record holds as
    `whole_…`; `begin` makes the first state, where there is no checkpoint;
    Everything runs on the mesh that was entered with `jax.set_mesh`, or on one device. A SIGTERM or
    SIGINT to any process of the run ends it after the step, saved. A run stopped in any way and
    begun again takes the same steps and leaves the same records as one that was never stopped.
    Raises ValueError when the directory belongs to another run, TrainingStopped, and OSError when a
    checkpoint cannot be saved.
    """
    config, directory = run.config, run.directory
    directory.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_owner(directory))
        checkpoints = stack.enter_context(Checkpoints(directory, config.logging.keep_checkpoints))
        state, step = _begin(run, checkpoints, data, begin)
        files = _files(config, directory)
        if directory.writer:
            with atomic_writer(directory.config) as out:
                out.write(files[directory.config.name].encode())
            chats = config.stage in ("sft", "grpo")
            companions.keep(directory, config.model, config.init_from, chats=chats)
        reporter = stack.enter_context(Reporter(run, step, probes, samples))
        stop = stack.enter_context(StopSignal())
        parts = _Parts(data, checkpoints, files, reporter, stop, config.data.batch_size)
        state, step = _train(run, state, step, parts)
        checkpoints.wait()
        finished = step >= config.training.steps
        if finished:
            reporter.whole(state.model, final)
            reporter.merged(state.model)
        return Outcome(step, finished, tuple(reporter.log.records), state.model)


def _begin(
    run: Prepared,
    checkpoints: Checkpoints,
    data: Loader | ModelLoader,
    begin: Callable[[Prepared], TrainState],
) -> tuple[TrainState, int]:
    """The state to go on from and the steps it has behind it; `data` is brought to its place."""
    restored = checkpoints.restore(run.shapes, lambda: begin(run).model)
    if restored is None:
        return begin(run), 0
    data.restore(restored.data_position)
    return restored.state, restored.step


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What the steps of one session need beside the state."""

    data: Loader | ModelLoader
    checkpoints: Checkpoints
    files: dict[str, str]  # that every checkpoint keeps
    reporter: Reporter
    stop: StopSignal
    rows: int  # of a batch of all processes

    def next(self, model: Nemotron) -> Any:
        """The next batch, placed on the mesh."""
        if isinstance(self.data, ModelLoader):
            return place_batch(self.data.next_with(model))
        return place_batch(next(self.data), self.rows)

    def report(self) -> Mapping[str, float]:
        """What the data say of their last batch."""
        return self.data.report() if isinstance(self.data, ModelLoader) else {}


def _train(run: Prepared, state: TrainState, step: int, parts: _Parts) -> tuple[TrainState, int]:
    config, reporter = run.config, parts.reporter
    steps, logging = config.training.steps, config.logging
    current = train_step = objective = None
    while step < steps and not parts.stop.agreed():
        batch = parts.next(state.model)
        compiles = current != (wanted := config.execution.at_step(step))
        if compiles:
            current = wanted
            reporter.progress.note("compiling the training step")
            objective = run.objective(current)
            train_step = compile_train_step(run, state, batch, objective)
            host.give_back_freed_memory()  # the compiler's, before the step's own comes on top
            distributed.meet()  # on CPUs whoever comes half a minute late is waited for no more
        state, metrics = train_step(state, batch, *objective.given)
        step += 1
        if compiles:
            jax.block_until_ready(metrics)
            reporter.speed.restart(step)  # from the first step after it
        last = step == steps
        evaluates = last or step % logging.evaluate_every == 0
        saves = last or step % logging.checkpoint_every == 0
        if evaluates or saves or step % logging.log_every == 0:
            _check_finite(metrics, step, config.training.max_skipped_steps)
        if evaluates or step % logging.log_every == 0:
            values = {**jax.device_get(metrics), **parts.report()}
            reporter.report(step, values, state.model, evaluates)
        if saves:
            # Its records first: after a kill they cannot be made again from a later checkpoint.
            reporter.log.sync()
            parts.checkpoints.save(state, parts.data.state(), parts.files)
        parts.checkpoints.check()
    if step < steps:
        reporter.progress.note(f"stopped after step {step}; saving")
        parts.checkpoints.save(state, parts.data.state(), parts.files)
    return state, step


def _check_finite(metrics: Metrics, step: int, limit: int) -> None:
    """Raise TrainingStopped after too many skipped steps in a row; waits for the step."""
    skipped = int(metrics["skipped_in_a_row"])
    if skipped >= limit:
        raise TrainingStopped(
            f"training stopped at step {step}: the last {skipped} steps had a non-finite loss or "
            f"gradient (training.max_skipped_steps={limit}) and changed no parameter; lower "
            "training.schedule.peak_learning_rate, or look at the data of these steps"
        )


def _files(config: RunConfig, directory: RunDirectory) -> dict[str, str]:
    files = {directory.config.name: to_json(config)}
    for file in (directory.tokenizer, directory.base):
        if file.exists():
            files[file.name] = file.read_text("utf-8")
    return files
