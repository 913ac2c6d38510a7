"""Routing and its balance loss against plain numpy definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.router import Router, balance_loss, choose, count_sequences
from tests.tiny_models import quick_jit

EXPERTS, CHOSEN, WIDTH = 12, 3, 8
route = quick_jit(
    lambda router, x: choose(router.logits(x), router.selection_bias[...], router.config)
)


def mean_loss(scores, chosen, documents, valid):
    every = jnp.ones(scores.shape[:2], bool) if valid is None else valid
    total = balance_loss(scores, chosen, documents, valid)
    return total / count_sequences(documents, every)


loss_of = quick_jit(mean_loss, static_argnums=1)


def make_router(bias, **options) -> Router:
    config = MoEConfig(
        num_experts=EXPERTS, experts_per_token=CHOSEN, expert_width=4, shared_width=4, **options
    )
    router = Router(config, WIDTH, Init(nnx.Rngs(0), 0.5, 0.5))
    router.selection_bias[...] = jnp.asarray(bias, jnp.float32)
    return router


def expected_routing(router, x) -> tuple[list[set], list[dict]]:
    """One token at a time: the groups whose two best biased scores sum highest, then the best
    biased scores among them; weights are the scores without the bias."""
    config, bias = router.config, np.asarray(router.selection_bias[...], np.float64)
    logits = np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64)
    experts_of_group = np.arange(EXPERTS).reshape(config.num_expert_groups, -1)
    chosen, weights = [], []
    for score in 1 / (1 + np.exp(-logits)):
        biased = score + bias
        strength = [np.sort(biased[group])[-2:].sum() for group in experts_of_group]
        groups = np.argsort(strength)[-config.groups_per_token :]
        allowed = [expert for group in groups for expert in experts_of_group[group]]
        best = sorted(allowed, key=lambda expert: biased[expert])[-CHOSEN:]
        total = sum(score[best]) if config.normalize_weights else 1
        chosen.append(set(best))
        weights.append({e: score[e] / total * config.weight_scale for e in best})
    return chosen, weights


@pytest.mark.parametrize(
    "options",
    [
        {"weight_scale": 2.5},
        {"normalize_weights": False},
        {"num_expert_groups": 4, "groups_per_token": 2, "weight_scale": 2.5},
        {"num_expert_groups": 12, "groups_per_token": 3},
    ],
    ids=str,
)
def test_routing_equals_its_definition(options):
    generator = np.random.default_rng(0)
    bias = generator.normal(size=EXPERTS)  # some choice + bias are negative
    router = make_router(bias, **options)
    x = generator.normal(size=(200, WIDTH)).astype(np.float32)
    index, weights, scores = (np.asarray(a) for a in route(router, x))
    chosen, expected = expected_routing(router, x)
    for token in range(len(x)):
        assert set(index[token]) == chosen[token]
        wanted = [expected[token][expert] for expert in index[token]]
        np.testing.assert_allclose(weights[token], wanted, rtol=1e-5)
    unbiased = make_router(np.zeros(EXPERTS), **options)
    np.testing.assert_array_equal(scores, route(unbiased, x)[2])
    changed = np.sort(index) != np.sort(np.asarray(route(unbiased, x)[0]))
    assert changed.any(axis=1).mean() > 0.5, "this bias must decide most choices"


def test_low_precision_inputs_are_routed_in_float32():
    router = make_router(np.zeros(EXPERTS))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, WIDTH)), jnp.bfloat16)
    for got, wanted in zip(route(router, x), route(router, x.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert route(router, x)[1].dtype == jnp.float32


def expected_balance(scores, sequences, valid) -> float:
    """E Σ f_i P_i of each sequence that holds a token, averaged over those sequences."""
    losses = []
    for row in range(len(scores)):
        for sequence in np.unique(sequences[row]):
            tokens = scores[row][valid[row] & (sequences[row] == sequence)].astype(np.float64)
            if not len(tokens):
                continue
            best = np.argsort(tokens, axis=1)[:, -CHOSEN:]
            f = np.bincount(best.ravel(), minlength=EXPERTS) / (CHOSEN * len(tokens))
            P = (tokens / tokens.sum(axis=1, keepdims=True)).mean(axis=0)
            losses.append(EXPERTS * (f * P).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_balance_loss_equals_its_definition(documents, padded):
    generator = np.random.default_rng(2)
    scores = generator.uniform(0.01, 1, (4, 17, EXPERTS)).astype(np.float32) ** 3
    lengths = np.array([17, 9, 1, 0]) if padded else np.full(4, 17)
    valid = np.arange(17) < lengths[:, None]
    sequences = np.cumsum(generator.random((4, 17)) < 0.3, axis=1) if documents else None
    got = loss_of(scores, CHOSEN, sequences, valid if padded else None)
    rows = np.zeros((4, 17), int) if sequences is None else sequences
    np.testing.assert_allclose(got, expected_balance(scores, rows, valid), rtol=1e-5)


def test_balance_loss_is_one_for_even_routing_and_larger_otherwise():
    even = np.zeros((1, 4, EXPERTS), np.float32)
    for token in range(4):
        even[0, token, 3 * token : 3 * token + 3] = 0.5
    np.testing.assert_allclose(loss_of(even, CHOSEN, None, None), 1, rtol=1e-6)
    uneven = np.broadcast_to(even[:, :1], even.shape)
    np.testing.assert_allclose(loss_of(uneven, CHOSEN, None, None), EXPERTS / CHOSEN, rtol=1e-6)
