"""A step on several devices is the step on one."""

import dataclasses

import jax
import numpy as np
import pytest

from nemotron_jax.config.precision import NVFP4Config, nemotron3_nvfp4
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.sharding import make_mesh
from nemotron_jax.training.state import place_state
from nemotron_jax.training.step import make_train_step
from tests.training.runs import changed, random_batch, small_run


def test_a_step_on_several_devices_equals_one_device():
    (one, expected), (several, metrics) = stepped(1), stepped(2)
    for name in ("loss", "mtp_loss", "aux_loss", "grad_norm", "expert_load_max"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=3e-5, err_msg=name)
    # The first moment is linear in the gradients; Adam's updates magnify rounding near zero.
    for name, moment in one.optimizer[1].mu.items():
        scale = np.linalg.norm(moment) + 1e-8
        other = np.asarray(several.optimizer[1].mu[name])
        assert np.linalg.norm(other - np.asarray(moment)) / scale < 1e-4, name
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(several))


@pytest.mark.parametrize("amax", ["global", "local"])
def test_codes_are_the_same_on_every_mesh_where_amax_is_global(amax):
    recipe = nemotron3_nvfp4(num_last_layers_high=0)
    recipe = dataclasses.replace(recipe, nvfp4=NVFP4Config(amax=amax))
    (one, _), (several, _) = (stepped(devices, precision=recipe) for devices in (1, 2))
    gaps = [
        np.linalg.norm(np.asarray(several.optimizer[1].mu[name]) - np.asarray(moment))
        / (np.linalg.norm(moment) + 1e-8)
        for name, moment in one.optimizer[1].mu.items()
    ]
    # With float32 sums in another order few codes flip; other scales round everything else.
    assert (np.median(gaps) < 0.02) == (amax == "global"), np.median(gaps)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"MeshConfig.data=64: there are \d+ devices"):
        make_mesh(MeshConfig(data=64))


def stepped(devices: int, **execution: object):
    config = changed(small_run("somewhere"), mesh={"data": devices}, execution=execution)
    return make_train_step(config)(place_state(config), random_batch(config, 0))
