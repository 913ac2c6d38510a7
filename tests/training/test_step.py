"""One optimizer step: micro-batches, the routers' biases, what decays, and what is skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.layers.router import SelectionBias
from nemotron_jax.model.parameters import flatten, unflatten, variables
from nemotron_jax.training.prepared import init_state, prepare_run
from nemotron_jax.training.step import balance, make_train_step, train_step
from tests.training.runs import changed, random_batch, small_run


@pytest.fixture(scope="module")
def config():
    return changed(small_run("somewhere"), data={"sequence_length": 48})


@pytest.fixture(scope="module")
def state(config):
    """The first state a few steps on, so that the learning rate and the moments are not zero."""
    begun = init_state(prepare_run(config))
    step = make_train_step(prepare_run(config))
    for number in range(3):
        begun, _ = step(begun, random_batch(config, number))
    return jax.tree.map(np.asarray, begun)


def biases(model):
    found = variables(model).items()
    return {name: np.asarray(one[...]) for name, one in found if isinstance(one, SelectionBias)}


@pytest.fixture(scope="module")
def stepped(config, state):
    return make_train_step(prepare_run(config))(state, random_batch(config, 9))


def test_micro_batches_are_one_batch(config, state, stepped):
    parts = changed(config, training={"micro_batches": 2})
    after, metrics = make_train_step(prepare_run(parts))(state, random_batch(config, 9))
    whole, expected = stepped
    for name in ("loss", "mtp_loss", "aux_loss", "grad_norm", "expert_load_max"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=3e-5, err_msg=name)
    # The first moment is linear in the gradients; Adam's updates magnify rounding near zero.
    for name, moment in whole.optimizer[1].mu.items():
        scale = np.linalg.norm(moment) + 1e-8
        assert np.linalg.norm(after.optimizer[1].mu[name] - moment) / scale < 1e-4, name
    for name, bias in biases(whole.model).items():
        np.testing.assert_array_equal(biases(after.model)[name], bias)


def test_an_overloaded_expert_loses_bias_and_an_idle_one_gains():
    load = jnp.array([[10.0, 0.0, 4.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    moved = balance(jnp.zeros((2, 4)), load, 0.25)
    np.testing.assert_array_equal(moved, [[-0.25, 0.25, 0, 0.25], [0, 0, 0, 0]])


def test_biases_move_by_the_rate_and_by_nothing_else(config, state, stepped):
    after, _ = stepped
    before, now = biases(state.model), biases(after.model)
    assert len(now) == 2  # the stack's and the MTP block's
    rate = config.training.router_bias_rate
    for name in now:
        moved = now[name] - before[name]
        assert np.any(moved != 0)
        np.testing.assert_allclose(np.abs(moved[moved != 0]), rate, rtol=1e-3)
    assert not any("selection_bias" in name for name in after.optimizer[1].mu)


@pytest.fixture(scope="module")
def tightly(config, state):
    """A step from empty moments with a strong decay, a tight clip and no balancing."""
    settings = dataclasses.replace(config.training.optimizer, weight_decay=0.9, clip_norm=1e-2)
    tight = changed(config, training={"router_bias_rate": 0.0, "optimizer": settings})
    fresh = dataclasses.replace(
        state,
        model=unflatten(
            state.model,
            flatten(state.model) | {n: 5.0 + bias for n, bias in biases(state.model).items()},
        ),
        optimizer=jax.tree.map(np.zeros_like, state.optimizer),
    )
    return fresh, *make_train_step(prepare_run(tight))(fresh, random_batch(config, 9))


def test_biases_are_untouched_by_decay_clip_and_gradient(tightly):
    before, after, _ = tightly
    for name, bias in biases(before.model).items():
        np.testing.assert_array_equal(biases(after.model)[name], bias)


def test_gradients_are_clipped_by_their_norm(config, tightly):
    _, after, metrics = tightly
    assert metrics["grad_norm"] > 0.1  # as measured, not as clipped
    squares = sum(np.sum(np.square(moment)) for moment in after.optimizer[1].mu.values())
    norm = np.sqrt(squares) / (1 - config.training.optimizer.beta1)
    np.testing.assert_allclose(norm, 1e-2, rtol=1e-4)


VECTORS = {
    "attention.norm.weight",
    "final_norm.weight",
    "mamba.mixer.A_log",
    "mamba.mixer.D",
    "mamba.mixer.dt_bias",
    "mamba.norm.weight",
    "moe.norm.weight",
    "mtp_block.blocks.0.norm.weight",
    "mtp_block.blocks.1.norm.weight",
    "mtp_block.embedding_norm.weight",
    "mtp_block.final_norm.weight",
    "mtp_block.hidden_norm.weight",
}


def test_decay_reaches_matrices_only(config, state):
    run = prepare_run(config)
    optimizer, parameters = run.optimizer, run.trained.select(flatten(state.model))
    nothing = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(nothing, optimizer.init(parameters), parameters)
    decayed = {name for name, update in updates.items() if np.any(update)}
    spared = parameters.keys() - decayed
    assert VECTORS <= spared
    assert all("norm" in name or "conv" in name for name in spared - VECTORS), spared - VECTORS
    for name in decayed:
        expected = config.training.optimizer.weight_decay * np.asarray(parameters[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)
    matrices = ("embedding", "head.weight", "router.weight", "experts.up", "x.weight", "k.weight")
    assert all(any(name.endswith(end) for name in decayed) for end in matrices)


def test_a_step_that_is_not_finite_changes_counters_alone(config, state):
    batch = random_batch(config, 9)
    spoiled = dataclasses.replace(batch, weights=np.full_like(batch.weights, np.inf))
    step = make_train_step(prepare_run(config))
    after, metrics = step(state, spoiled)
    jax.tree.map(np.testing.assert_array_equal, after.model, state.model)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, state.optimizer)
    assert int(after.step) == int(state.step) + 1
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    again, metrics = step(after, batch)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)
    assert np.any(flatten(again.model)["embedding"] != flatten(state.model)["embedding"])


def test_the_update_is_adamw(config, state, stepped):
    """One matrix by hand, from the moments that the step leaves behind."""
    after, metrics = stepped
    settings, name = config.training.optimizer, "head.weight"
    moments = after.optimizer[1]
    count = int(moments.count)
    mean = np.asarray(moments.mu[name], np.float64) / (1 - settings.beta1**count)
    square = np.asarray(moments.nu[name], np.float64) / (1 - settings.beta2**count)
    before = np.asarray(flatten(state.model)[name], np.float64)
    direction = mean / (np.sqrt(square) + settings.epsilon) + settings.weight_decay * before
    expected = before - float(metrics["learning_rate"]) * direction
    np.testing.assert_allclose(flatten(after.model)[name], expected, atol=2e-6)


def test_the_step_needs_no_host(config, state):
    run = prepare_run(config)
    step = lambda state, batch: train_step(state, batch, run, run.objective(config.execution))
    abstract = jax.eval_shape(step, state, random_batch(config, 0))
    assert jax.tree.structure(abstract[0]) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract[0], state)
    assert all(jax.tree.leaves(same))
