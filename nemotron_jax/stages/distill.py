"""Stage `distill`: the next token as a teacher predicts it, such as a quantised model's own
high-precision one."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.messages import is_conversations
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.evaluation.held_out import token_nats
from nemotron_jax.evaluation.statistics import NORMAL_95
from nemotron_jax.model.beside import teacher_model
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.posttraining.result_file import read_values, write_values
from nemotron_jax.pretrained import begin_run, load_pretrained, load_tokenizer
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import on_every_device
from nemotron_jax.stages import pretrain, sft
from nemotron_jax.training.chunked import Chunked, Divergence
from nemotron_jax.training.distillation import distill_objective, teachers_execution
from nemotron_jax.training.losses import Objective, token_losses
from nemotron_jax.training.prepared import Prepared
from nemotron_jax.training.report import Probe
from nemotron_jax.types import Batch


def run(config: RunConfig, directory: RunDirectory, mesh: Mesh) -> int:
    """Train a student on a run's text or conversations; the exit status.

    Raises ValueError where the teacher is not there, or has another vocabulary or tokenizer.
    """
    check_teacher(config)
    of_rows = sft if any(map(is_conversations, config.data.sources)) else pretrain
    return of_rows.run(config, directory, mesh, Lesson(config, mesh))


def check_teacher(config: RunConfig) -> None:
    """Raise ValueError in one line unless the teacher is there and has the student's vocabulary."""
    path, teacher = config.distill.teacher, teacher_model(config.distill)
    if teacher.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"DistillConfig.teacher={path!r}: its vocabulary has {teacher.vocab_size} tokens and "
            f"the student's {config.model.vocab_size}; predictions are compared token by token, so "
            "name a teacher with the same vocabulary"
        )


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a student learns, and how far it has come."""

    config: RunConfig
    mesh: Mesh

    @functools.cached_property
    def teacher(self) -> Nemotron:
        """Read when first asked for; without its drafts."""
        chosen = self.config.distill
        model = load_pretrained(
            chosen.teacher, chosen.dtype, mtp="drop", mesh=self.mesh, layout="training"
        )
        model.origin = None
        return model

    def objective(self, execution: Execution) -> Objective:
        """What a step computed so minimises."""
        config = self.config
        return distill_objective(config.training, config.distill, self.teacher, execution)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError where the teacher brings another tokenizer than the run's."""
        path = self.config.distill.teacher
        if not RunDirectory.named(path).tokenizer.exists():
            return
        if load_tokenizer(RunDirectory.named(path).path).fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f"DistillConfig.teacher={path!r}: its tokenizer is not the run's, "
                f"{tokenizer.origin}, so that its predictions mean other tokens; set "
                f"data.tokenizer={path!r}, or name another teacher"
            )

    def probe(self, batches: Sequence[Batch]) -> Probe:
        """A function of a model and how to run it: `teacher_kl`, KL(teacher || model) of the next
        token in nats, at temperature 1."""

        def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
            rows = [self._row_kl(model, execution, batch) for batch in batches]
            return {"teacher_kl": _mean(np.concatenate(rows), batches)}

        return evaluate

    def end(self, run: Prepared, last: Nemotron, batches: Sequence[Batch]) -> str:
        """Write DIR/result.json of a finished run, once, and say what it holds."""
        found, steps = read_values(run.directory.result), {"steps": self.config.training.steps}
        if not (steps | {"n_tokens": int(_tokens(batches).sum())}).items() <= found.items():
            found = self.result(begin_run(run).model, last, batches)
            write_values(run.directory, found)
        return summary(found)

    def result(self, first: Nemotron, last: Nemotron, batches: Sequence[Batch]) -> dict[str, Any]:
        """Losses in nats a token and KLs to the teacher, the student's as it computes at the end.

        `interval` is the 95 % interval of the loss after less the loss before, paired by row.
        """
        config = self.config
        execution = config.execution.at_step(config.training.steps - 1)
        chunk = config.training.loss_chunk
        ways = {
            "teacher": (self.teacher, teachers_execution(execution)),
            "student_before": (first, execution),
            "student_after": (last, execution),
        }
        nats = {
            name: np.concatenate(
                [
                    token_nats(model, batch, chunk=chunk, execution=how).sum(-1, dtype=np.float64)
                    for batch in batches
                ]
            )
            for name, (model, how) in ways.items()
        }
        kl = {
            name: np.concatenate([self._row_kl(*ways[name], batch) for batch in batches])
            for name in ("student_before", "student_after")
        }
        return {
            "format": "nemotron_jax.result",
            "format_version": 1,
            "stage": "distill",
            "loss": {name: _mean(rows, batches) for name, rows in nats.items()}
            | {"control_same_steps": None},
            "teacher_kl": {name: _mean(rows, batches) for name, rows in kl.items()},
            "interval": _interval(nats["student_after"] - nats["student_before"], batches),
            "n_tokens": int(_tokens(batches).sum()),
            "seeds": [config.seed],
            "steps": config.training.steps,
        }

    def _row_kl(
        self, model: Nemotron, execution: Execution, batch: Batch
    ) -> Float[np.ndarray, "B"]:
        """Summed KL(teacher || model) of each row's scored tokens."""
        how, chunk = teachers_execution(execution), self.config.training.loss_chunk
        kl = _token_kl(self.teacher, model, batch, executions=(how, execution), chunk=chunk)
        return np.asarray(kl).sum(-1, dtype=np.float64)


def summary(found: dict[str, Any]) -> str:
    """A result as a short table."""
    loss, kl = found["loss"], found["teacher_kl"]
    low, high = found["interval"]
    rows = {
        "teacher": f"{loss['teacher']:.4f} nats/token",
        "student": f"{loss['student_before']:.4f} before, {loss['student_after']:.4f} after, "
        f"{low:+.4f} to {high:+.4f} (95 %)",
        "KL to teacher": f"{kl['student_before']:.4f} before, {kl['student_after']:.4f} after",
    }
    return "\n".join(f"{name:15}{value}" for name, value in rows.items())


@functools.partial(jax.jit, static_argnames=("executions", "chunk"))
def _token_kl(
    teacher: Nemotron,
    model: Nemotron,
    batch: Batch,
    *,
    executions: tuple[Execution, Execution],
    chunk: int,
) -> Float[jax.Array, "B T"]:
    """KL(teacher || model) of each token's next one; 0 where the batch scores none."""
    hidden = [
        one(batch.tokens, segment_ids=batch.segment_ids, execution=how).hidden
        for one, how in zip((teacher, model), executions, strict=True)
    ]
    how = Chunked(Divergence(1.0), chunk)
    kl = token_losses(model.head.matrix(), hidden[1], hidden[0], how, teacher.head.matrix())
    return on_every_device(jnp.where(batch.weights[..., 0] > 0, kl, 0.0))


def _tokens(batches: Sequence[Batch]) -> Float[np.ndarray, "N"]:
    """Scored tokens of each row."""
    return np.concatenate([np.count_nonzero(b.weights[..., 0], axis=-1) for b in batches])


def _mean(sums: Float[np.ndarray, "N"], batches: Sequence[Batch]) -> float:
    """Of rows' sums over their scored tokens."""
    return float(sums.sum() / max(_tokens(batches).sum(), 1))


def _interval(gaps: Float[np.ndarray, "N"], batches: Sequence[Batch]) -> list[float]:
    """The 95 % interval of a mean over tokens whose rows are the independent things."""
    sizes = _tokens(batches)
    used = sizes > 0
    gaps, sizes = gaps[used], sizes[used]
    mean = gaps.sum() / sizes.sum()
    count = len(sizes)
    residuals = gaps - mean * sizes
    factor = math.sqrt(count / (count - 1)) if count > 1 else 0.0
    error = NORMAL_95 * factor * math.sqrt(float(residuals @ residuals)) / sizes.sum()
    return [float(mean - error), float(mean + error)]
