"""The tokenizer that belongs to a model, so that text can be given and taken where ids are."""

from pathlib import Path

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.model.nemotron import Nemotron


def tokenizer_of(model: Nemotron, who: str) -> Tokenizer:
    """The tokenizer in the directory that a model was loaded from, a run's or a hub model's.

    Raises ValueError in `who`'s name for a model that was not loaded from a directory.
    """
    if model.origin is None:
        raise ValueError(
            f"{who}: tokenizer=None takes that of the model's directory, and this model was not "
            "loaded from one; pass nj.load_tokenizer(DIR)"
        )
    directory = Path(model.origin.directory)  # of a run it is a checkpoint's
    return Tokenizer.load(directory.parents[1] if model.origin.is_run else directory)
