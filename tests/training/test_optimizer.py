"""What a run moves is known by the types of its parameters, whatever they are called."""

import dataclasses

import numpy as np
import pytest

from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import MTPConfig
from nemotron_jax.layers.norm import RMSNorm
from nemotron_jax.layers.router import RouterWeight, SelectionBias
from nemotron_jax.model.adapters import abstract_adapted, adapter_names
from nemotron_jax.model.parameters import abstract_model, load_by_bias, variables
from nemotron_jax.training.optimizer import Trained
from tests.training.runs import small_run

CONFIG = small_run("somewhere")
DRAFTS = "mtp_block."


@pytest.fixture(scope="module")
def model():
    return abstract_adapted(CONFIG.model, LoRAConfig(rank=2))


def trained(model, **changes) -> Trained:
    return Trained.of(model, dataclasses.replace(CONFIG.training, **changes))


def of_type(model, kind: type) -> set[str]:
    return {name for name, one in variables(model).items() if isinstance(one, kind)}


def test_each_kind_of_run_moves_its_own(model) -> None:
    names, biases, routers = (of_type(model, t) for t in (object, SelectionBias, RouterWeight))
    drafts = {name for name in names if name.startswith(DRAFTS)}
    assert len(biases) == len(routers) == 2 and 0 < len(adapter_names(model)) < len(names)
    every = trained(model)
    assert (every.parameters, every.biases) == (names - biases, biases)
    frozen = trained(model, freeze_routers=True)
    assert (frozen.parameters, frozen.biases) == (names - biases - routers, biases)
    boosted = trained(model, trains="mtp")
    assert (boosted.parameters, boosted.biases) == (drafts - biases, drafts & biases)
    plain = trained(model, mtp_depths=0)
    assert (plain.parameters, plain.biases) == (names - drafts - biases, biases - drafts)
    low_rank = trained(model, trains="lora")
    assert (low_rank.parameters, low_rank.biases) == (adapter_names(model), set())


def test_a_name_makes_no_router() -> None:
    model = abstract_model(CONFIG.model)
    model.final_norm.router = RMSNorm(4, 1e-5)
    model.final_norm.adapter = RMSNorm(4, 1e-5)
    moved = trained(model, freeze_routers=True).parameters
    assert {"final_norm.router.weight", "final_norm.adapter.weight"} <= moved
    assert not trained(model, trains="lora").parameters


def test_each_block_of_drafts_is_balanced_by_its_own_load() -> None:
    """Of more than ten blocks, whose names do not sort as their numbers do."""
    count = 12
    model = abstract_model(dataclasses.replace(CONFIG.model, mtp=MTPConfig("E" * count)))
    load = np.arange(count)[:, None] + np.zeros(4)
    found = load_by_bias(model, load, mtp=True)
    assert set(found) == {name for name in of_type(model, SelectionBias) if DRAFTS in name}
    for number in range(count):
        name = f"mtp_block.blocks.{number}.mixer.router.selection_bias"
        assert found[name][0] == number
    assert len(load_by_bias(model, load)) == 1
