"""Sampling draws from the distribution that temperature, top-k and top-p define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding.sampling import Sampling, keep_likely, sample
from nemotron_jax.sharding import make_mesh
from tests.tiny_models import quick_jit

VOCABULARY, DRAWS = 17, 20_000
draw = quick_jit(lambda logits, keys, sampling: sample(logits, keys, sampling))
CASES = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1000},
]


def definition(logits, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """Probabilities by sorting one token after the other."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    order = order[:top_k] if top_k else order
    p = np.exp(scaled[order] - scaled.max())
    p /= p.sum()
    kept, mass = [], 0.0
    for token, share in zip(order, p, strict=True):
        if mass >= top_p and kept:
            break
        kept.append((token, share))
        mass += share
    result = np.zeros(len(logits))
    for token, share in kept:
        result[token] = share / mass
    return result


@pytest.mark.parametrize("options", CASES, ids=str)
def test_draws_follow_the_filtered_distribution(options):
    logits = np.random.default_rng(0).normal(0, 1.5, VOCABULARY).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    rows = jnp.broadcast_to(logits, (DRAWS, VOCABULARY))
    tokens = draw(rows, keys, Sampling.create(**options))
    expected, counts = definition(logits, **options), np.bincount(tokens, minlength=VOCABULARY)
    allowed = expected > 0
    assert not counts[~allowed].any()
    wanted = DRAWS * expected[allowed]
    chi_square = np.sum((counts[allowed] - wanted) ** 2 / wanted)
    freedom = allowed.sum() - 1
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, -2.0, -3.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(draw(logits, keys, Sampling.create(0.0)), [1, 0])


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-45])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0], [0.0, -1.0, 1e-3, -3.0]])
    sampling = Sampling.create([temperature, 1.0], [0, 1], 1.0)
    tokens = draw(logits, jax.random.split(jax.random.key(0), 2), sampling)
    np.testing.assert_array_equal(tokens, [1, 2])


def test_each_row_draws_with_its_own_key():
    logits = jnp.zeros((3, VOCABULARY))
    keys = jax.random.split(jax.random.key(2), 3)
    together = draw(logits, keys, Sampling.create())
    for row in range(3):
        alone = draw(logits[row : row + 1], keys[row : row + 1], Sampling.create())
        assert alone[0] == together[row]


def test_equal_logits_stay_or_go_together():
    logits = jnp.asarray([[0.0, 2.0, 1.0, 1.0, -5.0]])
    kept = lambda k, p: np.flatnonzero(np.isfinite(keep_likely(logits, k, p)[0])).tolist()
    assert kept(2, 1.0) == [1, 2, 3]
    assert kept(1, 1.0) == [1]
    assert kept(0, 0.7) == [1, 2, 3]


def test_no_top_p_keeps_every_token_of_a_large_vocabulary():
    logits = np.random.default_rng(3).normal(0, 4, (1, 50_000)).astype(np.float32)
    logits[0, 7] = 60  # its share is 1 in float32
    assert np.isfinite(keep_likely(logits, 0, 1.0)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0, and finite"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0, and finite"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": None}, "temperature=None"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer"),
        ({"top_k": None}, "top_k=None"),
        ({"top_p": "most"}, "top_p='most'"),
    ],
    ids=str,
)
def test_values_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=f"Sampling: {message}"):
        Sampling.create(**options)


def test_a_high_temperature_is_uniform_and_a_high_k_keeps_every_token():
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(jnp.asarray([1.0, 5.0, 3.0]), (4000, 3))
    tokens = sample(rows, keys, Sampling.create(1e300, top_k=2**40))
    assert np.bincount(tokens, minlength=3).min() > 1333 - 5 * 30  # five standard deviations


def test_likely_tokens_of_a_vocabulary_that_devices_share_are_the_same():
    """Found by halves there, and by an order of all here; a filter of each kind, and both."""
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(size=(6, 64)) * 3, jnp.float32)
    logits = logits.at[4, ::2].set(-jnp.inf).at[5].set(0.0).at[5, 7].set(-0.0)  # all alike
    top_k = jnp.array([5, 0, 7, 1, 40, 3])[:, None]
    top_p = jnp.array([1.0, 0.6, 0.5, 1e-6, 0.9, 0.5])[:, None]
    expected = quick_jit(keep_likely)(logits, top_k, top_p)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=4), jax.devices())):
        # Another function: what is compiled without a mesh must not serve with one.
        got = quick_jit(lambda *operands: keep_likely(*operands))(logits, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got).sum(1), np.isfinite(expected).sum(1))
    np.testing.assert_array_equal(got, expected)
    assert 1 < np.isfinite(expected).sum(1).max() and np.isfinite(expected).sum(1)[3] == 1
