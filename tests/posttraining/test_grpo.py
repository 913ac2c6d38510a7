"""Advantages, masks and loss by hand in the corner cases, and laws of the objective."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.config.rl import ObjectiveConfig, RLConfig, RolloutConfig
from nemotron_jax.posttraining.grpo import (
    PolicyBatch,
    group_advantages,
    importance_weights,
    low_effort_reward,
    mismatch,
    policy_loss,
    turn_advantages,
)


def advantages(rewards, groups=None, counted=None, clip=50.0):
    rewards = np.array(rewards, np.float32)
    groups = np.zeros(len(rewards), int) if groups is None else np.array(groups)
    counted = np.ones(len(rewards), bool) if counted is None else np.array(counted)
    return group_advantages(rewards, groups, counted, clip).tolist()


def test_a_lone_success_gains_one_and_each_failure_loses_by_the_others_spread():
    # Others of the success: 0, 0, 0, no spread. Of a failure: 1, 0, 0, mean 1/3, std 1/sqrt(3).
    lost = -(1 / 3) / (1 / np.sqrt(3) + 1e-6)
    np.testing.assert_allclose(advantages([1, 0, 0, 0]), [1, lost, lost, lost], rtol=1e-5)


def test_equal_rewards_and_groups_of_one_teach_nothing():
    assert advantages([0.3] * 5) == [0] * 5
    assert advantages([1, 0], groups=[0, 1]) == [0, 0]


def test_a_group_of_two_has_no_spread_to_divide_by():
    assert advantages([1, 0.25]) == [0.75, -0.75]


def test_an_environments_failure_is_in_nobodys_mean():
    with_failure = advantages([1, 0, 0, 1, 0], counted=[True, True, False, True, True])
    without = advantages([1, 0, 1, 0])
    assert with_failure[2] == 0
    np.testing.assert_allclose(np.delete(with_failure, 2), without)
    assert advantages([1, 0], counted=[True, False]) == [0, 0]


def test_groups_are_apart_and_large_advantages_are_clipped():
    both = advantages([1, 0, 0, 0.5, 0.2, 0.9], groups=[7, 7, 7, 2, 2, 2])
    np.testing.assert_allclose(both[:3], advantages([1, 0, 0]))
    np.testing.assert_allclose(both[3:], advantages([0.5, 0.2, 0.9]))
    # Others 0 and 1e-3: mean 5e-4, std 1e-3/sqrt(2).
    assert advantages([1, 0, 1e-3])[0] == 50
    np.testing.assert_allclose(
        advantages([1, 0, 1e-3], clip=1e6)[0], 0.9995 / (1e-3 / np.sqrt(2) + 1e-6), rtol=1e-4
    )


def test_low_effort_rewards_short_right_answers_and_charges_for_long_ones():
    assert low_effort_reward(1, 0, 3000) == pytest.approx(1.2)
    assert low_effort_reward(1, 1500, 3000) == pytest.approx(1.1)
    assert low_effort_reward(0, 0, 3000) == 0
    assert low_effort_reward(1, 6000, 3000) == pytest.approx(0.8)
    assert low_effort_reward(0, 6000, 3000) == pytest.approx(-0.2)


def test_importance_is_capped_and_an_episodes_mismatch_is_its_tokens_mean():
    trainer, generator = np.log([0.5, 0.9, 0.2]), np.log([0.25, 0.1, 0.4])
    np.testing.assert_allclose(importance_weights(trainer, generator, 5.0), [2, 5, 0.5], rtol=1e-6)
    assert mismatch(trainer, generator) == pytest.approx((2 + 9 + 2) / 3)
    assert mismatch(trainer[:0], generator[:0]) == 1


def test_only_a_malformed_turn_is_penalised_or_masked():
    turns = [(2, 4, True), (6, 7, False)]
    gains, weights = turn_advantages(0.5, turns, 8, ObjectiveConfig())
    assert gains.tolist() == [0, 0, 0.5, 0.5, 0, 0, -5, 0]
    assert weights.tolist() == [0, 0, 1, 1, 0, 0, 1, 0]
    gains, weights = turn_advantages(0.5, turns, 8, ObjectiveConfig(invalid_turns="mask"))
    assert weights.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def small_batch(**fields) -> PolicyBatch:
    values = {
        "weights": [[1, 1, 0, 1]],
        "advantages": [[1, -2, 9, 0.5]],
        "importance": [[1, 0.5, 9, 2]],
        "generator_logprobs": np.log([[0.5, 0.5, 0.5, 0.5]]),
        "trainer_logprobs": np.log([[0.4, 0.5, 0.1, 0.2]]),
        "reference_logprobs": np.log([[0.4, 0.25, 0.9, 0.2]]),
    }
    integers = dict.fromkeys(("tokens", "targets", "segment_ids"), np.ones((1, 4), np.int32))
    values = {name: np.asarray(v, np.float32) for name, v in (values | fields).items()}
    return PolicyBatch(**integers, **values)


def loss_and_gradient(logprobs, batch, config):
    total = jnp.sum(batch.weights)
    function = lambda x: policy_loss(x, batch, config, total)
    (loss, sums), gradient = jax.value_and_grad(function, has_aux=True)(jnp.asarray(logprobs))
    return float(loss), gradient[0], {name: float(value) for name, value in sums.items()}


LOGPROBS = np.log(np.array([[0.6, 0.5, 0.3, 0.1]], np.float32))


def test_a_ratio_of_one_gives_the_weighted_policy_gradient():
    loss, gradient, sums = loss_and_gradient(LOGPROBS, small_batch(), ObjectiveConfig())
    # Three tokens count: importance times advantage is 1, -1 and 1.
    assert loss == pytest.approx(-1 / 3) and sums["clipped"] == 0
    np.testing.assert_allclose(gradient, [-1 / 3, 1 / 3, 0, -1 / 3], rtol=1e-6)
    assert sums["entropy"] == pytest.approx(-np.log(0.6 * 0.5 * 0.1) / 3)


def test_the_clip_holds_what_would_go_further_and_only_that():
    config = ObjectiveConfig(ratio="clipped")
    loss, gradient, sums = loss_and_gradient(LOGPROBS, small_batch(), config)
    # Ratios 1.5, 1, -, 0.5. The first is held at 1.28; the last has fallen and may rise again.
    assert loss == pytest.approx(-(1.28 - 1 + 0.5) / 3, rel=1e-5)
    np.testing.assert_allclose(gradient, [0, 1 / 3, 0, -0.5 / 3], atol=1e-6)
    assert sums["clipped"] == pytest.approx(1 / 3)
    falling = small_batch(advantages=[[1, -2, 9, -0.5]])
    _, gradient, sums = loss_and_gradient(LOGPROBS, falling, config)
    assert gradient[3] == 0 and sums["clipped"] == pytest.approx(2 / 3)


def test_the_kl_term_is_k3_under_the_policy():
    still = small_batch(advantages=[[0, 0, 0, 0]])
    config = ObjectiveConfig(kl_weight=0.1)
    loss, gradient, sums = loss_and_gradient(LOGPROBS, still, config)
    policy, reference = (np.exp(a)[0] for a in (LOGPROBS, still.reference_logprobs))
    drawn = policy / 0.5
    value = reference / policy - np.log(reference / policy) - 1
    kept = np.array([1, 1, 0, 1])
    assert sums["kl"] == pytest.approx(np.sum(kept * drawn * value) / 3, rel=1e-5)
    assert loss == pytest.approx(0.1 * sums["kl"], rel=1e-5)
    expected = 0.1 * kept * drawn * (1 - reference / policy) / 3
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_tokens_that_do_not_count_may_hold_anything():
    """Far off, infinite or no number at all, in any field: loss, sums and gradient stay as they
    are."""
    for config in (ObjectiveConfig(kl_weight=0.1), ObjectiveConfig(ratio="clipped", kl_weight=0.1)):
        batch = small_batch()
        whole = loss_and_gradient(LOGPROBS, batch, config)
        floats = ("advantages", "importance", "generator_logprobs", "trainer_logprobs")
        for name in ("logprobs", "reference_logprobs", *floats):
            for value in (-200, 200, -np.inf, np.inf, np.nan):
                logprobs = LOGPROBS.copy()
                spoiled = logprobs if name == "logprobs" else getattr(batch, name).copy()
                spoiled[0, 2] = value
                other = (
                    batch if name == "logprobs" else dataclasses.replace(batch, **{name: spoiled})
                )
                loss, gradient, sums = loss_and_gradient(logprobs, other, config)
                assert loss == whole[0] and sums == whole[2], (name, value)
                np.testing.assert_array_equal(gradient, whole[1], f"{name} {value}")


def test_weights_that_are_no_numbers_are_none():
    """As in NeMo RL; an episode that holds one is beyond every limit of its mismatch."""
    trainer = np.array([-1, -1, np.nan, -1, -np.inf, np.inf, -200], np.float32)
    generator = np.array([-1, -200, -1, np.nan, -1, -1, -1], np.float32)
    assert importance_weights(trainer, generator, 5.0).tolist() == [1, 0, 0, 0, 0, 0, 0]
    for place in range(1, 7):
        found = mismatch(trainer[place : place + 1], generator[place : place + 1])
        assert 1e30 < found < np.inf


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"RLConfig\.updates=2: .*clipped"):
        RLConfig(updates=2)
    with pytest.raises(ValueError, match=r"importance_cap=0\.5"):
        ObjectiveConfig(importance_cap=0.5)
    with pytest.raises(ValueError, match=r"temperature=0: must be positive"):
        RolloutConfig(temperature=0)
    with pytest.raises(ValueError, match=r"budget=4: must be None without thinking"):
        RolloutConfig(budget=4)
    assert RLConfig(updates=2, objective=dataclasses.replace(ObjectiveConfig(), ratio="clipped"))
