"""The model that a run holds beside the one it trains."""

import dataclasses
from pathlib import Path

from nemotron_jax.config.distill import DistillConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.run_directory import CONFIG, RunDirectory


@dataclasses.dataclass(frozen=True)
class Beside:
    """A teacher, or the reference of reinforcement learning; devices share it as they do the run's
    own model."""

    model: ModelConfig
    dtype: str

    @property
    def bytes(self) -> int:
        """Of its parameters."""
        return accounting.weight_bytes(self.model, bytes_each=accounting.BYTES[self.dtype])


def model_beside(config: RunConfig) -> Beside | None:
    """The model that a run's steps read and do not change; None where there is none.

    A teacher has no drafts. One that is not on this machine is taken to be like the student, as
    where a model teaches itself in a lower precision.
    """
    if config.stage == "distill":
        there = (Path(config.distill.teacher) / CONFIG).exists()
        teacher = teacher_model(config.distill) if there else config.model
        return Beside(dataclasses.replace(teacher, mtp=None), config.distill.dtype)
    if config.stage == "grpo" and config.rl.objective.kl_weight:
        return Beside(config.model, "float32")
    return None


def teacher_model(config: DistillConfig) -> ModelConfig:
    """The teacher's configuration. Raises ValueError where its directory holds none."""
    path = config.teacher
    run = RunDirectory.of_model(path, f"DistillConfig.teacher={path!r}")
    return ModelConfig.from_hf(path) if run is None else run.read().model
