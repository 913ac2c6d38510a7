"""Merged checkpoints are the run whose rate had decayed, where gradients do not depend on it."""

import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.config.run import LoggingConfig
from nemotron_jax.data.corpus import prepare
from nemotron_jax.evaluation.held_out import held_out_probe
from nemotron_jax.model.parameters import abstract_model, unflatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.checkpoint import load_parameters
from nemotron_jax.training.merge import merge, minus_sqrt_weights
from tests.training.runs import changed, train


def decay(progress, final_ratio):
    return final_ratio + (1 - final_ratio) * (1 - np.sqrt(progress))


@pytest.mark.parametrize("final_ratio", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("steps", [[0, 1], [10, 20, 30, 40], [0, 5, 50, 60, 200]])
def test_a_merge_is_the_decayed_trajectory(steps, final_ratio):
    """SGD on a linear loss: the gradients are given, so the updates are linear in the rates.

    Checkpoints at every step emulate the decay of every step; few checkpoints emulate its mean over
    the steps between them.
    """
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(steps[-1], 7))
    start = generator.normal(size=7)
    constant = [start, *(start - np.cumsum(gradients, axis=0))]
    tables = [{"w": jnp.asarray(constant[step], jnp.float32)} for step in steps]
    merged = merge(tables, minus_sqrt_weights(steps, final_ratio))["w"]

    theta = constant[steps[0]].copy()
    fine = np.linspace(0, 1, 20_001)[1:] - 0.5 / 20_000
    for first, last in zip(steps[:-1], steps[1:], strict=True):
        within = (first + fine * (last - first) - steps[0]) / (steps[-1] - steps[0])
        mean_rate = decay(within, final_ratio).mean()
        theta -= mean_rate * gradients[first:last].sum(axis=0)
    np.testing.assert_allclose(merged, theta, rtol=0, atol=2e-5)


def test_many_checkpoints_follow_the_curve_itself():
    steps = list(range(1001))
    weights = np.array(minus_sqrt_weights(steps))
    survival = np.cumsum(weights[::-1])[::-1][1:]  # what the update before each checkpoint counts
    middle = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(survival[10:], decay(middle, 0.0)[10:], atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("final_ratio", [0.0, 0.01, 1.0])
def test_weights_are_an_average(count, final_ratio):
    weights = minus_sqrt_weights([200 * n for n in range(count)], final_ratio)
    assert len(weights) == count and min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    if final_ratio == 1.0:  # no decay: the last checkpoint
        assert weights[-1] == pytest.approx(1)


@pytest.mark.parametrize("steps", [[], [3, 3], [5, 1]])
def test_steps_must_ascend(steps):
    with pytest.raises(ValueError, match="must ascend"):
        minus_sqrt_weights(steps)


def test_tables_are_read_one_at_a_time_and_keep_their_dtype():
    alive = []

    def tables():
        for value in (1.0, 2.0, 4.0):
            alive.append(value)
            yield {"w": jnp.full(3, value, jnp.bfloat16)}

    stream = tables()
    merged = merge(stream, [0.5, 0.25, 0.25])
    np.testing.assert_array_equal(merged["w"], np.full(3, 2.0))
    assert merged["w"].dtype == jnp.bfloat16 and alive == [1.0, 2.0, 4.0]


def test_wrong_tables_are_errors():
    one, other = {"a": jnp.ones(2)}, {"b": jnp.ones(2)}
    with pytest.raises(ValueError, match="differs in"):
        merge([one, other], [0.5, 0.5])
    with pytest.raises(ValueError, match="1 tables for 2 weights"):
        merge([one], [0.5, 0.5])
    with pytest.raises(ValueError, match="not as many"):
        merge([one, one], [1.0])


def test_the_window_must_be_kept():
    with pytest.raises(ValueError, match="merge_window=4.*keep_checkpoints=3"):
        LoggingConfig(merge_window=4, keep_checkpoints=3)


def test_a_run_compares_its_merged_checkpoints_with_the_last(finished_run, tmp_path):
    config = changed(finished_run[0], logging={"merge_window": 3})
    last = train(config, tmp_path).records[-1]
    assert last["merged_steps"] == 3
    assert last["held_out_loss"] == finished_run[2].records[-1]["held_out_loss"]
    # By hand: S is the mean of 1 - 0.99 sqrt(p) over (0, 1/2) and (1/2, 1).
    first = 1 - 0.99 * 2 * (2 / 3) * 0.5**1.5
    second = 1 - 0.99 * 2 * (2 / 3) * (1 - 0.5**1.5)
    tables = [load_parameters(RunDirectory(tmp_path, step))[-1] for step in (6, 9, 12)]
    shares = (1 - first, first - second, second)
    merged = {
        name: sum(share * table[name] for share, table in zip(shares, tables, strict=True))
        for name in tables[0]
    }
    _, corpus = prepare(config.data, config.model.vocab_size, tmp_path)
    evaluate = held_out_probe(corpus, config.data, config.logging.evaluate_rows, 512)
    model = unflatten(abstract_model(config.model), merged)
    loss = evaluate(model, config.execution)["held_out_loss"]
    assert last["merged_held_out_loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(loss - last["held_out_loss"]) > 1e-2
    assert train(config, tmp_path).records[-1] == last
