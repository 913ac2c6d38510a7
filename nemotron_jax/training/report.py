"""What a session of training writes down and shows: records, curves, samples, progress."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorboardX

from nemotron_jax import distributed
from nemotron_jax.config.execution import Execution
from nemotron_jax.model.accounting import training_flops
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, unflatten
from nemotron_jax.sharding import current_mesh
from nemotron_jax.training.checkpoint import load_parameters
from nemotron_jax.training.merge import merge, minus_sqrt_weights
from nemotron_jax.training.metrics import MetricsLog, SamplesLog, Speed
from nemotron_jax.training.plots import draw_curves
from nemotron_jax.training.prepared import Prepared
from nemotron_jax.training.progress import Progress

# Values of the model as it stands, run as a step runs it, for a record.
Probe = Callable[[Nemotron, Execution], Mapping[str, float]]
Samples = Callable[[Nemotron], str]


class Reporter:
    """Everything a session writes and shows. Of several processes all call every method, for the
    model is evaluated by all of them, and the run directory's writer alone writes."""

    def __init__(
        self,
        run: Prepared,
        step: int,
        probes: Sequence[Probe],
        samples: Samples | None,
    ) -> None:
        self._run, config, directory = run, run.config, run.directory
        self._probes, self._samples = probes, samples
        self.log = MetricsLog(directory.metrics, step, writer=directory.writer)
        writes_samples = samples is not None and directory.writer
        self._samples_log = SamplesLog(directory.samples, step) if writes_samples else None
        self._board = tensorboardX.SummaryWriter(
            str(directory.tensorboard),
            purge_step=step + 1 if step else None,
            write_to_disk=directory.writer,
        )
        before = self.log.records[-1].get("seconds") if self.log.records else None
        flops = training_flops(
            config.model, config.data.sequence_length, mtp_depths=config.training.mtp_depths
        )
        self.speed = Speed(run.tokens_per_step, flops.total, step, before or 0.0)
        self.progress = Progress(config.training.steps, step)
        if step:
            self.progress.note(f"resumed after step {step}")

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *unused: object) -> None:
        self.progress.close()
        self.log.close()
        with contextlib.suppress(OSError):  # a full disk has been told of; curves are copies
            self._board.close()

    def report(self, step: int, values: dict[str, Any], model: Nemotron, evaluates: bool) -> None:
        """Write the record of a step, with evaluation, sample and plot where they are due."""
        values = {
            name: getattr(value, "item", lambda v=value: v)() for name, value in values.items()
        }
        del values["skipped_in_a_row"]
        record = {"step": step, "tokens": step * self._run.tokens_per_step, **values}
        record |= self.speed.read(step)
        record["processes"] = distributed.process_count()
        self.speed.pause()
        if evaluates:
            record |= self._evaluate(model, step)
        self.log.append(record)
        record = self.log.records[-1]
        for name, value in record.items():
            if name not in ("step", "tokens", "processes") and value is not None:
                self._board.add_scalar(name, value, step)
        self.progress.show(record)
        if evaluates:
            self._illustrate(step, model)
        self.speed.resume()

    def whole(self, model: Nemotron, final: Probe | None) -> None:
        """Add what `final` says to the last record, once."""
        records = self.log.records
        if final is None or self._is_done("whole_held_out_loss"):
            return
        step = records[-1]["step"]
        values = final(model, self._run.config.execution.at_step(step - 1))
        self.log.extend_last({f"whole_{name}": value for name, value in values.items()})

    def merged(self, model: Nemotron) -> None:
        """Compare the merged newest checkpoints with the last one, where the config asks for it."""
        window = self._run.config.logging.merge_window
        steps = self._run.directory.steps()[-window:] if window else []
        if len(steps) < 2 or not self._probes or self._is_done("merged_steps"):
            return
        schedule = self._run.config.training.schedule
        weights = minus_sqrt_weights(
            steps, schedule.final_learning_rate / schedule.peak_learning_rate
        )
        mesh = current_mesh()
        tables = (load_parameters(self._run.directory.at(n), mesh=mesh)[-1] for n in steps)
        last = self.log.records[-1]
        merged = unflatten(model, flatten(model) | merge(tables, weights))
        values = self._evaluate(merged, last["step"])
        self.log.extend_last(
            {"merged_steps": len(steps), **{f"merged_{name}": v for name, v in values.items()}}
        )
        self.progress.note(
            f"merged the checkpoints of steps {', '.join(map(str, steps))}: "
            + ", ".join(
                f"{name} {value:.4f} (last: {last[name]:.4f})"
                for name, value in values.items()
                if value != last[name]
            )
        )

    def _is_done(self, name: str) -> bool:
        """Whether the last record has such a value already, or there is none; as process 0 says,
        for all must do the same."""
        records = self.log.records
        return distributed.from_first(lambda: not records or name in records[-1])

    def _evaluate(self, model: Nemotron, step: int) -> dict[str, float]:
        execution = self._run.config.execution.at_step(step - 1)
        values = (probe(model, execution) for probe in self._probes)
        return {name: value for found in values for name, value in found.items()}

    def _illustrate(self, step: int, model: Nemotron) -> None:
        if self._run.directory.writer:
            draw_curves(self.log.records, self._run.directory)
        if self._samples is not None:
            text = self._samples(model)
            self._board.add_text("sample", text, step)
            if self._samples_log is not None:
                self._samples_log.append(step, text)
