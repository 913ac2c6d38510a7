"""A step on several devices is the step on one."""

import jax
import numpy as np
import pytest

from nemotron_jax.config.precision import nemotron3_nvfp4
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.model.parameters import flatten
from nemotron_jax.sharding import make_mesh, place_batch
from nemotron_jax.training.state import place_state
from nemotron_jax.training.step import make_train_step
from tests.training.runs import changed, random_batch, small_run


def test_a_step_on_several_devices_equals_one_device():
    (one, expected), (several, metrics) = stepped(1), stepped(2, fsdp=2)
    for name in ("loss", "mtp_loss", "aux_loss", "grad_norm", "expert_load_max"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=3e-5, err_msg=name)
    assert all(gap < 1e-4 for gap in gaps_of(one, several).values())


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_quantised_codes_are_the_same_on_every_mesh(micro_batches):
    recipe = nemotron3_nvfp4(num_last_layers_high=0)
    (one, _), (several, _) = (stepped(data, micro_batches, precision=recipe) for data in (1, 2))
    gaps = gaps_of(one, several)
    experts = {name for name in gaps if ".experts." in name}
    # Blocks of an expert's weight gradient hold whichever tokens share a device.
    assert all(gap < 2e-3 for name, gap in gaps.items() if name not in experts), gaps
    assert np.median(list(gaps.values())) < 1e-4


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"data=64 times fsdp=1 is 64 devices, but there are \d"):
        make_mesh(MeshConfig(data=64), jax.devices())


def stepped(data: int, micro_batches: int = 1, fsdp: int = 1, **execution: object):
    config = changed(
        small_run("somewhere"),
        mesh={"data": data, "fsdp": fsdp},
        execution=execution,
        training={"micro_batches": micro_batches},
    )
    with jax.set_mesh(make_mesh(config.mesh, jax.devices())):
        batch, state = place_batch(random_batch(config, 0)), place_state(config)
        if fsdp > 1:  # every matrix with a width has its part on each device, and so its moments
            for table in (flatten(state.model), state.optimizer[1].mu):
                part = table["mamba.mixer.x.weight"].addressable_shards[0].data
                assert part.size * fsdp == table["mamba.mixer.x.weight"].size
        return jax.device_get(make_train_step(config)(state, batch))


def gaps_of(one, several) -> dict[str, float]:
    """Relative distance of the first moments, which are linear in the gradients, by name."""
    return {
        name: float(np.linalg.norm(several.optimizer[1].mu[name] - moment))
        / (float(np.linalg.norm(moment)) + 1e-8)
        for name, moment in one.optimizer[1].mu.items()
    }
