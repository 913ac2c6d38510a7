"""A run file whose command line is wrong in every test; TEXTS is replaced by a folder."""

import pathlib

from ml_collections import ConfigDict

from nemotron_jax.config.convert import to_config_dict
from tests.training.runs import small_run


def get_config() -> ConfigDict:
    """A run of small texts."""
    return to_config_dict(small_run(pathlib.Path("TEXTS")))
