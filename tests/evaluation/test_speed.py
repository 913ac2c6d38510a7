"""The speed suite runs every kind of work, leaves the model alone and adds its numbers up."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import MTPConfig
from nemotron_jax.evaluation import speed
from nemotron_jax.evaluation.serving_speed import ServingSpeed
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.training.prepared import abstract_state, prepare_run


@pytest.fixture(scope="module")
def result(run_config):
    """Of a model of one layer: what is compiled here is seven programs, and the engine's."""
    data = dataclasses.replace(run_config.data, sequence_length=16, batch_size=2)
    sizes = dataclasses.replace(run_config.model, pattern="*", moe=None)
    config = dataclasses.replace(run_config, data=data)
    model = Nemotron(sizes, rngs=nnx.Rngs(0))
    before = [np.array(leaf) for leaf in jax.tree.leaves(model)]
    serving = ServingSpeed(concurrency=(1, 2), contexts=(8,), new_tokens=12, repetitions=1)
    found = speed.SpeedTest(config, repetitions=2, new_tokens=16, serving=serving).run(model)
    for leaf, copy in zip(jax.tree.leaves(model), before, strict=True):
        np.testing.assert_array_equal(leaf, copy)  # the step took a copy over, not the model
    return found


def test_every_kind_of_work_is_timed(result):
    kinds = ("prefill", "decode_1_row", "decode_2_rows", "train")
    for kind in kinds:
        assert result.values[f"{kind}_tokens_per_second"].mean > 0
    table, memory = result.timed[:2]
    assert memory.rows[0][0] > 50
    assert [row[0] for row in table.rows] == list(kinds)
    for _, rows, length, best, median, compile_s in table.rows:
        assert compile_s >= 0
        assert best >= median > 0
        assert rows * length / best > 1e-4  # no work here takes less than a tenth of a millisecond


def test_the_engine_is_timed_by_concurrency_and_context(result):
    rows = result.timed[2].rows
    assert [row[:2] for row in rows] == [(1, 8), (2, 8)]
    for requests, context, rate, first, longest, between in rows:
        assert result.values[f"serving_{requests}x{context}_tokens_per_second"].mean == rate > 0
        assert 0 < first <= longest and between > 0
        # Eleven gaps after the first token, at this rate for all requests together.
        assert rate <= 1e3 * 12 * requests / (first + 11 * between) * 1.001
    ratios = dict(result.timed[3].rows)
    for ratio in ("over_one_by_one", "over_batched", "first_token_of_a_known_prefix"):
        assert ratios[f"serving_{ratio}"] > 0
    assert ratios["serving_compiled_later"] == 0


def test_rates_are_tokens_over_seconds():
    timing = speed.Timing(seconds=(0.5, 0.2, 0.4), compile_s=1.0, tokens=100)
    assert timing.best == pytest.approx(500) and timing.median == pytest.approx(250)


@pytest.mark.parametrize(
    "change",
    [{"freeze_routers": True}, {"trains": "lora"}, {"mtp_depths": 0}, {"trains": "mtp"}],
    ids=str,
)
def test_the_timed_state_is_the_one_that_the_run_trains(run_config, change):
    sizes = dataclasses.replace(run_config.model, mtp=MTPConfig("*"))
    training = dataclasses.replace(run_config.training, **{"mtp_depths": 1} | change)
    lora = LoRAConfig(rank=2) if training.trains == "lora" else None
    config = dataclasses.replace(run_config, model=sizes, training=training, lora=lora)
    run = prepare_run(config)
    expected = abstract_state(run)
    timed = jax.eval_shape(lambda model: speed._fresh_state(run, model), expected.model)
    assert jax.tree.structure(timed) == jax.tree.structure(expected)


def test_a_model_without_mtp_is_timed_without_it(model, run_config):
    config = speed._config_of(model, None)
    assert config.model == model.config and config.training.mtp_depths == 0
    assert speed._config_of(model, run_config).data == run_config.data
