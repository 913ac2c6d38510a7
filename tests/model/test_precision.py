"""In bfloat16 a model says what it says in float32, except where a router's choice is a toss-up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from tests.golden_cases import GOLDEN, model, reference, tokens
from tests.tiny_models import quick_jit

TOSS_UP = 2**-6  # biased scores are near 1, where bfloat16 has steps of 2**-8 to 2**-7


@quick_jit
def observe(model, rows):
    """Hidden states, log-probabilities [B, T, V], and expert choices [B, T, layers, E].

    A token's experts are what it adds to the router load of the tokens before it.
    """
    until = lambda row, end: model(row[None], lengths=end[None])
    ends = jnp.arange(rows.shape[1] + 1)
    outputs = jax.vmap(lambda row: jax.vmap(functools.partial(until, row))(ends))(rows)
    hidden = outputs.hidden[:, -1, 0]
    choices = jnp.diff(outputs.router_load, axis=1)
    return hidden, jax.nn.log_softmax(model.logits(hidden)), choices


@pytest.fixture(scope="module", params=("hybrid_moe_latent", "dense"))
def both(request):
    """The case, and what is observed in float32 and in bfloat16."""
    case = request.param
    half = nj.load_pretrained(GOLDEN / case / "checkpoint", dtype="bfloat16")
    return case, observe(model(case), tokens(case)), observe(half, tokens(case))


def test_distributions_agree_where_the_same_experts_spoke(both):
    _, (_, wide, wide_choices), (hidden, narrow, narrow_choices) = both
    assert hidden.dtype == jnp.bfloat16 and narrow.dtype == jnp.float32
    same = np.asarray(wide_choices == narrow_choices).all(axis=(-2, -1))
    assert same.mean() >= 0.9  # two choices in a hundred are toss-ups, and each token makes three
    divergence = np.sum(np.exp(wide) * (np.asarray(wide) - np.asarray(narrow)), axis=-1)
    assert divergence[same].mean() <= 0.01
    assert np.median(divergence) <= 5e-4  # a quarter of this is usual without a change of experts


@pytest.mark.parametrize("both", ["hybrid_moe_latent"], indirect=True)
def test_routers_agree_where_the_choice_is_no_toss_up(both):
    case, (_, _, wide), (_, _, narrow) = both
    expected = reference(case)
    layers = sorted(int(name.split("/")[1]) for name in expected if name.endswith("/experts"))
    biases = model(case).moe.mixer.router.selection_bias[...]
    clear = []
    for layer, bias in zip(layers, biases, strict=True):
        logits = expected[f"router/{layer}/logits"].astype(np.float64)
        scores = np.sort(1 / (1 + np.exp(-logits)) + bias, axis=-1)
        count = expected[f"router/{layer}/experts"].shape[1]
        clear.append(scores[:, -count] - scores[:, -count - 1] > TOSS_UP)
    clear = np.stack(clear, axis=1)
    same = np.asarray(wide[0] == narrow[0]).all(axis=-1)
    assert clear.mean() >= 0.8  # of all choices; the reference has scores for row 0
    assert same[clear].mean() >= 0.99
    assert same.mean() >= 0.97
