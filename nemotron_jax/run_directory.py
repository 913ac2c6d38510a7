"""A run's directory: the names of its files, and what it was saved as.

    RUN/  config.json  tokenizer.json  corpus/       what it is made of
          base.json                                  the model that its adapters are trained on
          metrics.jsonl  samples.txt  plots/  tensorboard/
          hub/                                       what goes along with an exported model
          checkpoints/step_00000200/                 see training/checkpoint.py
          transcripts.jsonl  transcripts.html        episodes, where the run learns from rewards
          pools.json  pools.jsonl                    tasks that were tried before, and their plays
          result.json                                what the run has changed
          sft/  grpo/                                parts of a run of stage grpo: runs themselves

No other module spells these names, or asks whether a config.json is a run's.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemotron_jax.config.convert import from_json
from nemotron_jax.config.resume import check_resumable
from nemotron_jax.config.run import RunConfig, TrainingConfig
from nemotron_jax.config.untrusted import read_object
from nemotron_jax.manifest import find_fault

CONFIG, TOKENIZER, BASE = "config.json", "tokenizer.json", "base.json"
_FOLDERS = ("checkpoints", "tensorboard", "plots", "corpus", "hub")
_CHECKPOINT = re.compile(r"step_(\d{8,})")
# What parameters are read from: a fault elsewhere in a checkpoint leaves the model whole.
_MODEL = (CONFIG, "state.json", "arrays/model/")
_HINT = "pass the directory of a model or of a run"
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a run was at its newest checkpoint."""

    config: RunConfig
    step: int


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, there or to be."""

    path: Path
    step: int | None = None  # of the checkpoint that was named; the newest whole one otherwise
    writer: bool = True  # whether this process writes the files that a run has once

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def named(cls, path: str | os.PathLike) -> "RunDirectory":
        """A path as a run's directory, or as a checkpoint of one."""
        path = Path(path)
        step = _CHECKPOINT.fullmatch(path.name)
        if step and path.is_dir() and path.parent == cls(path.parent.parent).checkpoints:
            return cls(path.parent.parent, int(step[1]))
        return cls(path)

    @classmethod
    def of(cls, path: str | os.PathLike) -> "RunDirectory | None":
        """The run that a path names, by its directory or by one of its checkpoints.

        None where it names no run: a hub model's directory, whose config.json is another thing, or
        one without any. Raises ValueError where config.json cannot be read.
        """
        run = cls.named(path)
        if run.step is not None:
            return run
        if not run.config.exists():
            return None
        values = read_object(run.config, _HINT)
        return run if "format_version" in values and "model_type" not in values else None

    @classmethod
    def of_model(cls, path: str | os.PathLike, who: str) -> "RunDirectory | None":
        """The run that a path names, None for a hub model's directory.

        Raises ValueError in `who`'s name where the path is neither's.
        """
        if not (Path(path) / CONFIG).exists():
            raise ValueError(f"{who}: {path} holds no {CONFIG}; {_HINT}")
        return cls.of(path)

    @property
    def config(self) -> Path:
        """The run as it last began or went on, as JSON."""
        return self.path / CONFIG

    @property
    def base(self) -> Path:
        """What a run's adapters are trained on; in each of its checkpoints too."""
        return self.path / BASE

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run's text, as the tokenizers library writes it."""
        return self.path / TOKENIZER

    @property
    def metrics(self) -> Path:
        """A line for each step that was logged."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Texts that the model went on with while it was trained."""
        return self.path / "samples.txt"

    @property
    def plots(self) -> Path:
        """The folder of the run's pictures."""
        return self.path / "plots"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def corpus(self) -> Path:
        """Tokens of the run's text."""
        return self.path / "corpus"

    @property
    def companions(self) -> Path:
        """What goes along with the weights where they are saved, as a chat template."""
        return self.path / "hub"

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints, one a step that was saved."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """What the run has changed, as JSON."""
        return self.path / "result.json"

    @property
    def transcripts(self) -> Path:
        """Episodes for programs."""
        return self.path / "transcripts.jsonl"

    @property
    def transcripts_page(self) -> Path:
        """Episodes for people."""
        return self.path / "transcripts.html"

    @property
    def pools(self) -> Path:
        """The tasks that are played, once they were tried."""
        return self.path / "pools.json"

    @property
    def pool_plays(self) -> Path:
        """The plays that the pools come from, batch by batch."""
        return self.path / "pools.jsonl"

    def part(self, stage: str) -> "RunDirectory":
        """The directory of one stage of a run that has several: `sft` or `grpo`."""
        return RunDirectory(self.path / stage, writer=self.writer)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, whole or not; a file is no checkpoint."""
        folder = self.checkpoints
        paths = folder.iterdir() if folder.is_dir() else ()
        matches = (_CHECKPOINT.fullmatch(path.name) for path in paths if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def newest_name(self) -> str:
        """The name of the newest checkpoint, empty without one."""
        return self.checkpoint(steps[-1]).name if (steps := self.steps()) else ""

    def at(self, step: int) -> "RunDirectory":
        """The run as of one of its checkpoints."""
        return dataclasses.replace(self, step=step)

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"

    def newest_whole(self, parts: tuple[str, ...] = ("",)) -> int | None:
        """The step of the newest checkpoint without a damaged file; warns of those passed over.

        `parts` are the beginnings of the names that count. None where there is no checkpoint;
        raises ValueError where there are some and none is whole.
        """
        faults = []
        for step in reversed(self.steps()):
            path = self.checkpoint(step)
            fault = find_fault(path, parts)
            if fault is None:
                if faults:
                    _LOGGER.warning("falling back to checkpoint %s", path)
                return step
            _LOGGER.warning("checkpoint %s is damaged: %s", path, fault)
            faults.append(fault)
        if not faults:
            return None
        raise ValueError(
            f"{self.checkpoints} holds no whole checkpoint: {'; '.join(faults)}; restore the "
            "files, or remove the folder to start from the first step"
        )

    def whole_step(self) -> int:
        """The step of the newest checkpoint that the model can be read from; 0 without checkpoints.

        Warns of damaged ones passed over; raises ValueError where there are some and none is whole.
        """
        return self.newest_whole(_MODEL) or 0

    def model_step(self) -> int:
        """The step of the checkpoint that the model is read from, the one named or the newest.

        Raises ValueError where there is none or it is damaged.
        """
        step = self.newest_whole(_MODEL) if self.step is None else self.step
        if step is None:
            raise ValueError(
                f"load_parameters: {self.checkpoints.absolute()} holds no checkpoint; train for "
                "some steps first"
            )
        if self.step is not None and (fault := find_fault(self.checkpoint(step), _MODEL)):
            raise ValueError(f"load_parameters: {fault}; choose one of {self.steps()}")
        return step

    def saved(self) -> Saved | None:
        """Configuration and step of the checkpoint that was named, or of the newest one whose
        configuration is whole; None without one."""
        step = self.newest_whole((CONFIG,)) if self.step is None else self.step
        return None if step is None else Saved(self.at(step).read(), step)

    def read(self) -> RunConfig:
        """The run as it last went on, or as the checkpoint that was named keeps it."""
        file = self.config if self.step is None else self.checkpoint(self.step) / CONFIG
        return from_json(file.read_text("utf-8"))

    def check(self, config: RunConfig) -> None:
        """Raise ValueError when the directory cannot be this run's: its checkpoints are another
        run's or further than the run goes, or `check_names` raises."""
        self.check_names()
        if (saved := self.saved()) is None:
            return
        check_resumable(saved.config, config, str(self.path))
        if saved.step > (steps := config.training.steps):
            raise ValueError(
                f"run {self.path} has {saved.step} steps behind it and training.steps={steps} asks "
                "for fewer: there is nothing to train; name another workdir, or raise "
                "training.steps"
            )

    def check_names(self) -> None:
        """Raise ValueError where a file has the name of a folder of the run, or the reverse."""
        for path in self._files():
            wrong = path.exists() and path.is_dir() != (path.name in _FOLDERS)
            if wrong:
                there, kept = "a file", "a folder"
                if path.is_dir():
                    there, kept = kept, there
                raise ValueError(f"run {path} is {there} and must be {kept}; move it away")

    def with_saved_schedule(self, config: RunConfig) -> RunConfig:
        """The run with the schedule that it was begun with, where only its steps have changed; of
        stage grpo either part with its own."""
        if config.stage != "grpo":
            return dataclasses.replace(config, training=self._as_begun(config.training))
        training = self.part("grpo")._as_begun(config.training)
        first = config.warm_start
        if first is not None:
            of_first = self.part("sft")._as_begun(first.training)
            first = dataclasses.replace(first, training=of_first)
        return dataclasses.replace(config, training=training, warm_start=first)

    def _as_begun(self, training: TrainingConfig) -> TrainingConfig:
        saved = self.saved()
        if saved is None or saved.config.training.steps == training.steps:
            return training
        return dataclasses.replace(training, schedule=saved.config.training.schedule)

    def _files(self) -> Iterator[Path]:
        """Everything that has a name of its own here."""
        names = (name for name, kind in vars(RunDirectory).items() if isinstance(kind, property))
        return (getattr(self, name) for name in names)
