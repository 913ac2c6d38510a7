"""Every published configuration of the family is a model with its published count, silently.

`reconstructed` texts come from the recipes that convert the published checkpoints; the others are
the hub's own.
"""

import dataclasses
import math
import pathlib
import warnings

import jax
import pytest

from nemotron_jax.config.hub_writer import to_hf
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.model import accounting
from nemotron_jax.model.parameters import abstract_model

CONFIGS = pathlib.Path(__file__).parents[1] / "golden" / "hub_configs"
FILES = sorted(CONFIGS.glob("*_config.json"))
COUNTS = {
    "NVIDIA-Nemotron-3-Nano-30B": 31_577_940_288,
    "NVIDIA-Nemotron-3-Nano-4B": 3_973_556_832,
    "NVIDIA-Nemotron-3-Super": 123_611_033_088,
    "NVIDIA-Nemotron-3-Ultra": 560_524_603_904,
    "NVIDIA-Nemotron-3.5-Lightning": 32_913_266_240,
    "Nemotron-H-4B": 4_489_223_040,
    "Nemotron-H-8B": 8_100_852_736,
    "Nemotron-H-47B": 46_791_554_816,
    "Nemotron-H-56B": 56_324_350_464,
    "Nemotron-Nano-9B-v2": 8_888_227_328,
    "Nemotron-Nano-12B-v2": 12_310_001_152,
}
TENSORS = {
    "NVIDIA-Nemotron-3-Super": 42_683,
    "NVIDIA-Nemotron-3.5-Lightning": 6_513,
    "NVIDIA-Nemotron-3-Nano-4B": 263,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.removesuffix("_config.json"))
def test_a_published_config_has_its_published_count(file: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ModelConfig.from_hf(file)
        assert ModelConfig.from_hf(to_hf(config)) == config
    [count] = [count for name, count in COUNTS.items() if file.name.startswith(name)]
    assert accounting.parameters(config).total == count
    for name, tensors in TENSORS.items():
        if file.name.startswith(name):
            assert sum(accounting.hub_tensor_counts(config)) == tensors


def test_the_largest_config_traces_without_a_warning() -> None:
    config = ModelConfig.from_hf(CONFIGS / "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16_config.json")
    assert config.mamba.time_step_limit == (0.0, math.inf)
    direct = dataclasses.replace(config.mamba, time_step_limit=(0.0, 1e308))
    config = dataclasses.replace(config, mamba=direct)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = jax.ShapeDtypeStruct((1, 8), "int32")
        out = jax.eval_shape(lambda model, t: model(t).hidden, abstract_model(config), tokens)
    assert out.shape == (1, 8, config.width)
