"""What every benchmark gives and takes: a subject to be built for, a model to run, a result."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Protocol

from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.corpus import Corpus, prepare
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_directory import TOKENIZER

Cell = str | int | float


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows below named columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves by name, each a sequence of (x, y), and horizontal lines to read them against."""

    name: str  # of the file
    title: str
    x_label: str
    y_label: str
    curves: dict[str, tuple[tuple[float, float], ...]]
    baselines: dict[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What one suite found.

    `values` are the numbers to compare models by, `standard_errors` those of some of them, `n` how
    many independent things (documents, tasks, repetitions) they are a mean over.
    """

    values: dict[str, float]
    n: int
    standard_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    transcripts: tuple[dict[str, Any], ...] = ()  # JSON-able, one for each generated answer
    counted: str = ""  # what `n` counts, as in "documents"


class Evaluator(Protocol):
    """One suite, built for a subject; nothing else of it is known to those who run it."""

    name: str

    def run(self, model: Nemotron) -> Result: ...


@dataclasses.dataclass(frozen=True)
class Subject:
    """What suites may need beside the model, each part made when first asked for.

    `config` is None for a checkpoint that came without one. `model` is the checkpoint's own where
    the configuration may be of a run of another.
    """

    checkpoint: Path
    config: RunConfig | None
    data_directory: Path  # holds the corpus, or will
    seed: int = 0
    model: ModelConfig | None = None

    def require_config(self, suite: str) -> RunConfig:
        """The configuration; ValueError in the suite's name where there is none."""
        if self.config is None:
            raise ValueError(
                f"suite {suite!r}: {self.checkpoint} has no run's configuration to take data from; "
                "pass --config=configs/NAME.py"
            )
        return self.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer; ValueError where it has none."""
        return Tokenizer.load(self.checkpoint)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The configuration's text in the checkpoint's tokens."""
        config = self.require_config("corpus")
        data = config.data
        if self.data_directory != self.checkpoint:
            self.tokenizer  # noqa: B018  # a checkpoint without one is an error, not a new tokenizer
            data = dataclasses.replace(data, tokenizer=str(self.checkpoint / TOKENIZER))
        model = self.model or config.model
        options = {"eos_token": model.eos_token, "progress": lambda line: None}
        return prepare(data, model.vocab_size, self.data_directory, **options)[1]
