"""Models and tokenizers by path: hub directories and directories of runs."""

import os
from pathlib import Path

from nemotron_jax.interop.hf_export import save_hub
from nemotron_jax.interop.hf_import import load_hub
from nemotron_jax.model.nemotron import Nemotron


def load_pretrained(path: str | os.PathLike, dtype: str | None = "float32") -> Nemotron:
    """The model of a hub directory.

    `dtype` is that of the matrices (None: as stored); what the family computes in float32 stays
    float32.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"load_pretrained: {directory} holds no config.json; pass a model's directory"
        )
    return load_hub(directory, dtype)


def save_pretrained(model: Nemotron, path: str | os.PathLike, dtype: str | None = None) -> None:
    """Write `model` as a hub directory; `dtype=None` keeps each tensor's original dtype."""
    save_hub(model, path, dtype)
