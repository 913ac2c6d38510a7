"""What is evaluated, before anything of it is loaded: a checkpoint or a URL, and data for it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from nemotron_jax import distributed
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.corpus import Corpus, prepare
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.evaluation.suite import Unavailable
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_directory import TOKENIZER


@dataclasses.dataclass(frozen=True)
class Subject:
    """What suites may need beside the model, each part made when first asked for.

    `checkpoint` is None behind a `url`. `config` is None for a checkpoint that came without one.
    `model` is the checkpoint's own where the configuration may be of a run of another.
    `tokenizer_path` is that of --tokenizer.
    """

    checkpoint: Path | None
    config: RunConfig | None
    data_directory: Path  # holds the corpus, or will
    seed: int = 0
    model: ModelConfig | None = None
    url: str = ""
    model_name: str = ""  # that a server knows the model by
    tokenizer_path: str = ""
    loaded_from: Path | None = None  # one checkpoint of a run's directory, or the same path
    # Reads a model of another directory, as this one's was read.
    load: Callable[[Path], Nemotron] | None = None

    def require_config(self, suite: str) -> RunConfig:
        """The configuration; ValueError in the suite's name where there is none."""
        if self.config is None:
            raise ValueError(
                f"suite {suite!r}: {self.checkpoint or self.url} has no run's configuration to "
                "take data from; pass --config=configs/NAME.py"
            )
        return self.config

    def require_mtp(self) -> None:
        """Raise Unavailable for a model that has nothing to draft with."""
        if self.model is not None and self.model.mtp is None:
            raise Unavailable("this model has no MTP block to draft with")

    def require_tokens(self, *tokens: str, way_out: str = "") -> None:
        """Raise Unavailable, with a way out, for a tokenizer without these special tokens."""
        if missing := set(tokens) - set(self.tokenizer.special_tokens):
            found = f"its tokenizer has no {', '.join(sorted(missing))}: it knows no chat"
            raise Unavailable(f"{found}; {way_out}" if way_out else found)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of --tokenizer, or the checkpoint's own; ValueError where it has none, Unavailable
        behind a URL."""
        if self.tokenizer_path:
            return Tokenizer.load(self.tokenizer_path)
        if self.checkpoint is None:
            raise Unavailable(f"{self.url} brings no tokenizer; pass --tokenizer=DIR")
        return Tokenizer.load(self.checkpoint)

    @property
    def tokenizer_if_any(self) -> Tokenizer | None:
        """The tokenizer, or None where there is none."""
        try:
            return self.tokenizer
        except (ValueError, Unavailable):
            return None

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The configuration's text in the checkpoint's tokens."""
        config = self.require_config("corpus")
        data = config.data
        if self.data_directory != self.checkpoint:
            self.tokenizer  # noqa: B018  # a checkpoint without one is an error, not a new tokenizer
            path = self.tokenizer_path or str(self.checkpoint / TOKENIZER)
            data = dataclasses.replace(data, tokenizer=path)
        model = self.model or config.model
        made = lambda: prepare(
            data,
            model.vocab_size,
            self.data_directory,
            eos_token=model.eos_token,
            progress=lambda line: None,
        )
        return distributed.first_alone(made)[1]
