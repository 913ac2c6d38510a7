"""The model's laws hold with the TPU's kernels, interpreted, in the place of the CPU's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from nemotron_jax.model.parameters import abstract_model, flatten
from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import op as grouped
from pallas_kernels.grouped_matmul import pallas_tpu as grouped_tpu
from pallas_kernels.ssd import op as ssd
from pallas_kernels.ssd import pallas_tpu as ssd_tpu
from tests.tiny_models import quick_jit, random_tokens, randomised

FIRST, SECOND = 131, 14  # tokens of two documents: one ends inside a chunk of 128
TOKENS = FIRST + SECOND
TOLERANCE = 5e-5  # another order of float32 sums; of the largest magnitude


@pytest.fixture(scope="module")
def model():
    return randomised(abstract_model(models.kernel_tiny()), seed=0)


def switch_in_the_kernels(monkeypatch):
    """Switches the kernels in: what a CPU would choose is what a TPU would, interpreted."""
    inner = functools.partial(functools.partial, interpret=True)
    forward, backward, outputs = map(inner, (ssd_tpu.forward, ssd_tpu.backward, ssd_tpu.outputs))
    scan = dispatch.Implementation(forward, backward, platforms=("cpu",), outputs=outputs)
    monkeypatch.setitem(ssd.SCAN.implementations, "cpu", scan)
    mlp = dispatch.Implementation(
        dispatch.keeping_operands(inner(grouped_tpu.mlp)),
        grouped.mlp_gradients(inner(grouped_tpu.mlp_gradients)),
    )
    monkeypatch.setitem(grouped.MLP.implementations, "xla", mlp)


def gradient_of_packed(model, tokens):
    """The gradient of two packed documents, and their hidden states."""
    direction = jnp.asarray(np.random.default_rng(1).standard_normal((TOKENS, model.config.width)))
    documents = jnp.asarray(np.arange(TOKENS) >= FIRST, jnp.int32)[None] + 1

    def total(model):
        output = model(tokens, segment_ids=documents)
        return jnp.sum(output.hidden[0] * direction), output.hidden

    return jax.grad(total, has_aux=True)(model)


def values(model, tokens):
    """Beside these, hidden states of both documents apart, of all tokens as one, and of these in a
    prefill and a short rest."""
    gradient, packed = gradient_of_packed(model, tokens)
    apart = [model(part).hidden for part in (tokens[:, :FIRST], tokens[:, FIRST:])]
    cache, pieces = model.init_cache(1, TOKENS), []
    for part in (tokens[:, :FIRST], tokens[:, FIRST:]):
        output = model(part, cache=cache)
        cache = output.cache
        pieces.append(output.hidden)
    whole = model(tokens).hidden
    return gradient, (packed, jnp.concatenate(apart, 1)), (whole, jnp.concatenate(pieces, 1))


def assert_close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_packing_prefill_and_gradients_hold_with_the_kernels_switched_in(model, monkeypatch):
    tokens = random_tokens(1, 1, TOKENS)
    expected, _ = quick_jit(gradient_of_packed)(model, tokens)
    switch_in_the_kernels(monkeypatch)
    gradient, packed, pieces = quick_jit(values)(model, tokens)
    assert_close(*packed)
    assert_close(*pieces)
    expected, gradient = flatten(expected), flatten(gradient)
    for name in expected:
        if np.any(expected[name]):
            assert_close(gradient[name], expected[name])
