"""Episodes in rows: nothing depends on the packing, and masks leave out what they name."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nemotron_jax.config.rl import ObjectiveConfig
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Verdict
from nemotron_jax.model.parameters import flatten
from nemotron_jax.playing.episode import Episode, TurnSpan
from nemotron_jax.posttraining.grpo import grpo_objective
from nemotron_jax.posttraining.policy_batch import (
    Placed,
    place_episodes,
    policy_batch,
    rows_needed,
    score_tokens,
    token_gains,
)
from nemotron_jax.sharding import make_mesh, place_batch
from nemotron_jax.training.prepared import init_state, place_state, prepare_run
from nemotron_jax.training.step import train_step
from tests.tiny_models import quick_jit
from tests.training.runs import changed, small_run

TASK = registry["arithmetic"].split(0, "train", 0)

ROUTER, BIAS = "moe.mixer.router.weight", "moe.mixer.router.selection_bias"


def parts_of(config) -> tuple:
    """What the objective is made of."""
    return config.rl, config.training.loss_chunk, config.execution


def episode(length: int, seed: int, **fields) -> Episode:
    """Two turns of random tokens; the generator's log-probabilities are made up."""
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(2, length), 3, replace=False)).tolist()
    turns = (TurnSpan(cuts[0], cuts[1], True, 1, True), TurnSpan(cuts[2], length, True, 0, True))
    logprobs = np.zeros(length, np.float32)
    for turn in turns:
        logprobs[turn.start : turn.stop] = -6.2 + 0.1 * generator.standard_normal(
            turn.stop - turn.start
        )
    values = {
        "task": TASK,
        "group": 0,
        "tokens": tuple(generator.integers(16, 500, length).tolist()),
        "logprobs": logprobs,
        "turns": turns,
        "truncated": False,
        "verdict": Verdict(1.0),
        "messages": (),
    }
    return Episode(**values | fields)


EPISODES = [episode(length, n) for n, length in enumerate((20, 9, 31, 14, 26, 5, 11))]
ADVANTAGES = np.array([1, -0.5, 0.3, 2, -1, 0.7, -2], np.float32)


@pytest.fixture(scope="module")
def config():
    run = changed(
        small_run("somewhere"),
        data={"sequence_length": 64, "batch_size": 8},
        training={"mtp_depths": 0},
    )
    # Made-up log-probabilities are far from the model: none is to be left out for that.
    objective = dataclasses.replace(run.rl.objective, sequence_limit=10.0)
    rollout = dataclasses.replace(run.rl.rollout, temperature=0.5)
    rl = dataclasses.replace(run.rl, objective=objective, rollout=rollout)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, pattern="M*E"), rl=rl)


@pytest.fixture(scope="module")
def state(config):
    return init_state(prepare_run(config))


@pytest.fixture(scope="module")
def learned(config, state):
    """The loss and gradients of a batch of this run."""
    objective = grpo_objective(*parts_of(config))

    @quick_jit
    def evaluate(model, batch):
        function = lambda model: objective.loss(model, batch, objective.totals(batch), None)
        return jax.value_and_grad(function, has_aux=True)(model)

    def run(batch):
        (loss, sums), gradient = evaluate(state.model, batch)
        return loss, sums, flatten(gradient)

    return run


def packed(episodes, config, state, **data):
    run = changed(config, data=data)
    score = functools.partial(
        score_tokens,
        execution=run.execution,
        chunk=run.training.loss_chunk,
        temperature=run.rl.rollout.temperature,
    )
    return policy_batch(
        episodes,
        ADVANTAGES[: len(episodes)],
        score,
        state.model,
        rows=run.data.batch_size,
        row_tokens=run.data.sequence_length,
        objective=run.rl.objective,
    )


def assert_same(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=2e-5)
    np.testing.assert_allclose(one[1]["entropy"], other[1]["entropy"], rtol=2e-5)
    for name, gradient in one[2].items():
        scale = np.linalg.norm(other[2][name]) + 1e-7
        assert np.linalg.norm(gradient - other[2][name]) / scale < 5e-4, name


def test_packed_episodes_are_the_episodes_apart(config, state, learned, monkeypatch) -> None:
    together, _ = packed(EPISODES, config, state)
    each_its_row = lambda lengths, *unused: [Placed(row, 0, 1) for row in range(len(lengths))]
    monkeypatch.setattr("nemotron_jax.posttraining.policy_batch.place_episodes", each_its_row)
    apart, _ = packed(EPISODES, config, state)
    assert np.count_nonzero(together.segment_ids.max(axis=1) > 1) >= 2
    assert apart.segment_ids.max() == 1
    assert_same(learned(together), learned(apart))
    spoiled = dataclasses.replace(together, advantages=np.roll(together.advantages, 1, axis=1))
    with pytest.raises(AssertionError):
        assert_same(learned(spoiled), learned(apart))


def test_a_batch_in_parts_on_two_devices_is_the_whole_one(config, state, learned) -> None:
    """With the routers' weights frozen: they stay, and their selection biases move."""
    batch, _ = packed(EPISODES, config, state)
    loss, sums, gradient = learned(batch)
    training = {"micro_batches": 2, "freeze_routers": True, "router_bias_rate": 0.125}
    run = changed(config, training=training, mesh={"data": 2})
    with jax.set_mesh(make_mesh(run.mesh, jax.devices())):
        prepared, objective = prepare_run(run), grpo_objective(*parts_of(run))
        step = quick_jit(lambda *given: train_step(*given, prepared, objective))
        begun = place_state(prepared)
        parts, said = jax.device_get(step(begun, place_batch(batch)))
    moments = flatten(parts.optimizer[1].mu)
    norm = np.sqrt(sum(np.sum(np.square(gradient[name])) for name in moments))
    told = {"loss": loss, "entropy": sums["entropy"], "grad_norm": norm}
    for name, value in told.items():
        np.testing.assert_allclose(value, said[name], rtol=2e-4, err_msg=name)
    # Adam's first moment is linear in the clipped gradient.
    optimizer = config.training.optimizer
    scale = (1 - optimizer.beta1) * min(1.0, optimizer.clip_norm / norm)
    for name, moment in moments.items():
        gap = np.linalg.norm(scale * gradient[name] - moment)
        assert gap < 5e-4 * (np.linalg.norm(moment) + 1e-7), name
    before, after = flatten(jax.device_get(begun.model)), flatten(parts.model)
    frozen = before.keys() - moments.keys()
    assert {name for name in frozen if not name.startswith("mtp_block.")} == {ROUTER, BIAS}
    assert np.array_equal(after[ROUTER], before[ROUTER]) and gradient[ROUTER].any()
    assert set(np.unique(np.abs(after[BIAS] - before[BIAS]))) in ({0.125}, {0, 0.125})


def test_values_stand_where_their_token_is_predicted(config, state) -> None:
    batch, mismatches = packed(EPISODES, config, state)
    places = place_episodes([len(e.tokens) for e in EPISODES], 8, 64)
    for one, place, gain in zip(EPISODES, places, ADVANTAGES, strict=True):
        for offset in np.flatnonzero(one.own):
            here = place.row, place.start + offset - 1
            assert batch.targets[here] == one.tokens[offset]
            assert batch.weights[here] == 1 and batch.advantages[here] == gain
            assert batch.generator_logprobs[here] == one.logprobs[offset]
            ratio = np.exp(batch.trainer_logprobs[here] - one.logprobs[offset])
            np.testing.assert_allclose(batch.importance[here], min(ratio, 5), rtol=1e-5)
    assert batch.weights.sum() == sum(e.own.sum() for e in EPISODES)
    assert len(mismatches) == len(EPISODES) and min(mismatches) > 1


def test_the_policy_that_plays_is_the_one_that_is_learned(config, state, learned) -> None:
    """At its temperature: before a step, the trainer's log-probabilities are the loss's own."""
    batch, _ = packed(EPISODES, config, state)
    own = batch.weights > 0
    entropy = learned(batch)[1]["entropy"]
    np.testing.assert_allclose(entropy, -batch.trainer_logprobs[own].mean(), rtol=2e-5)
    warm = dataclasses.replace(config.rl.rollout, temperature=1.0)
    warm = dataclasses.replace(config, rl=dataclasses.replace(config.rl, rollout=warm))
    other = packed(EPISODES, warm, state)[0].trainer_logprobs
    assert np.abs(other - batch.trainer_logprobs)[own].max() > 0.01


def test_what_does_not_count_weighs_nothing() -> None:
    config = ObjectiveConfig()
    weigh = lambda one, mismatch=1.0, config=config: token_gains(one, 1.0, mismatch, config)[1]
    one = EPISODES[0]
    np.testing.assert_array_equal(weigh(one), one.own)
    assert not weigh(episode(20, 0, verdict=Verdict(0.0, infra_error="gone"))).any()
    assert not weigh(one, mismatch=2.01).any() and weigh(one, mismatch=2.0).any()
    (first, last) = one.turns
    closed = dataclasses.replace(one, forced=(first.start, last.start))  # by the budget
    assert np.flatnonzero(weigh(one) != weigh(closed)).tolist() == [first.start, last.start]
    np.testing.assert_array_equal(weigh(closed), closed.own)
    cut = episode(20, 0, truncated=True)
    assert weigh(cut).any()
    assert not weigh(cut, config=ObjectiveConfig(overlong="mask")).any()


def test_a_call_that_was_cut_off_is_penalised_or_left_to_overlong() -> None:
    turn = TurnSpan(3, 9, well_formed=False, calls=0, closed=False, cut_call=True)
    cut = episode(9, 0, turns=(turn,), truncated=True)
    learn = lambda one, **fields: token_gains(one, 0.5, 1.0, ObjectiveConfig(**fields))
    gains, weights = learn(cut)
    assert gains[3:].tolist() == [-5] * 6 and weights[3:].all()
    gains, weights = learn(cut, cut_off_calls="keep")
    assert gains[3:].tolist() == [0.5] * 6 and weights[3:].all()
    assert not learn(cut, cut_off_calls="keep", overlong="mask")[1].any()
    broken = dataclasses.replace(cut, turns=(dataclasses.replace(turn, cut_call=False),))
    assert learn(broken, cut_off_calls="keep")[0][3:].tolist() == [-5] * 6


def test_a_batch_without_a_counted_token_changes_no_weight(config, state, learned) -> None:
    failed = [dataclasses.replace(e, verdict=Verdict(0.0, infra_error="gone")) for e in EPISODES]
    loss, _, gradient = learned(packed(failed, config, state)[0])
    assert loss == 0 and not any(np.any(value) for value in gradient.values())


def test_rows_always_suffice_and_too_few_are_named(config) -> None:
    generator = np.random.default_rng(0)
    rollout = dataclasses.replace(
        config.rl.rollout, prompts=10, generations=7, max_tokens=30, environments=("arithmetic",)
    )
    run = dataclasses.replace(config, rl=dataclasses.replace(config.rl, rollout=rollout))
    run = changed(run, data={"sequence_length": 100})
    assert rows_needed(run.rl.rollout, run.data.sequence_length) == 24
    for _ in range(50):
        lengths = generator.integers(2, 31, 70).tolist()
        place_episodes(lengths, 24, 100)
    with pytest.raises(ValueError, match=r"data\.batch_size=5: .* need 7 rows"):
        place_episodes([60] * 7, 5, 100)
