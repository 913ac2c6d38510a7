"""What a session of training writes down and shows: records, curves, samples, progress."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorboardX

from nemotron_jax.config.execution import Execution
from nemotron_jax.model.accounting import training_flops
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import unflatten
from nemotron_jax.training.checkpoint import load_parameters
from nemotron_jax.training.merge import merge, minus_sqrt_weights
from nemotron_jax.training.metrics import MetricsLog, SamplesLog, Speed
from nemotron_jax.training.plots import draw_curves
from nemotron_jax.training.prepared import Prepared
from nemotron_jax.training.progress import Progress

# Values of the model as it stands, run as a step runs it, for a record.
Probe = Callable[[Nemotron, Execution], Mapping[str, float]]
Sampler = Callable[[Nemotron], str]


class Reporter:
    """Everything a session writes and shows."""

    def __init__(
        self,
        run: Prepared,
        step: int,
        probes: Sequence[Probe],
        sampler: Sampler | None,
    ) -> None:
        self._run, config, directory = run, run.config, run.directory
        self._probes, self._sampler = probes, sampler
        self.log = MetricsLog(directory.metrics, step)
        self._samples = None if sampler is None else SamplesLog(directory.samples, step)
        self._board = tensorboardX.SummaryWriter(
            str(directory.tensorboard), purge_step=step + 1 if step else None
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
        self.speed.pause()
        if evaluates:
            record |= self._evaluate(model, step)
        self.log.append(record)
        record = self.log.records[-1]
        for name, value in record.items():
            if name not in ("step", "tokens") and value is not None:
                self._board.add_scalar(name, value, step)
        self.progress.show(record)
        if evaluates:
            self._illustrate(step, model)
        self.speed.resume()

    def whole(self, model: Nemotron, final: Probe | None) -> None:
        """Add what `final` says to the last record, once."""
        records = self.log.records
        if final is None or not records or "whole_held_out_loss" in records[-1]:
            return
        step = records[-1]["step"]
        values = final(model, self._run.config.execution.at_step(step - 1))
        self.log.extend_last({f"whole_{name}": value for name, value in values.items()})

    def merged(self, model: Nemotron) -> None:
        """Compare the merged newest checkpoints with the last one, where the config asks for it."""
        window = self._run.config.logging.merge_window
        steps = self._run.directory.steps()[-window:] if window else []
        done = not self.log.records or "merged_steps" in self.log.records[-1]
        if len(steps) < 2 or not self._probes or done:
            return
        schedule = self._run.config.training.schedule
        weights = minus_sqrt_weights(
            steps, schedule.final_learning_rate / schedule.peak_learning_rate
        )
        tables = (load_parameters(self._run.directory.at(step))[-1] for step in steps)
        last = self.log.records[-1]
        values = self._evaluate(unflatten(model, merge(tables, weights)), last["step"])
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

    def _evaluate(self, model: Nemotron, step: int) -> dict[str, float]:
        execution = self._run.config.execution.at_step(step - 1)
        values = (probe(model, execution) for probe in self._probes)
        return {name: value for found in values for name, value in found.items()}

    def _illustrate(self, step: int, model: Nemotron) -> None:
        draw_curves(self.log.records, self._run.directory)
        if self._sampler is not None:
            text = self._sampler(model)
            self._samples.append(step, text)
            self._board.add_text("sample", text, step)
