"""The run of the kill tests, for train.py's command line; the sources come as an override."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from nemotron_jax.config.convert import to_config_dict
from tests.training.runs import changed, small_run

STEPS = 120


def get_config() -> ConfigDict:
    """A run whose step compiles fast, for it is begun dozens of times."""
    config = small_run(Path("replaced"), checkpoint_every=5, evaluate_every=40, keep_checkpoints=2)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pattern="M*E", mtp=None),
        training=dataclasses.replace(config.training, steps=STEPS, mtp_depths=0),
    )
    return to_config_dict(changed(config, data={"sequence_length": 32}))
