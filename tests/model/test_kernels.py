"""The model's laws hold with the TPU's kernels, interpreted, in the place of the CPU's; and its
train step compiles with them for TPUs that are not here."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models, pretrain_super_phase1, pretrain_tiny_nvfp4
from nemotron_jax.config.convert import from_config_dict, to_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.parameters import abstract_model, flatten
from nemotron_jax.plan import plan
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
    alone = dispatch.Implementation(dispatch.keeping_operands(inner(grouped_tpu.mlp_gradients)))
    monkeypatch.setitem(grouped.MLP_GRADIENTS.implementations, "xla", alone)


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


# Of a step in emulated NVFP4: scan, experts and their quantisation, attention, convolution.
OF_A_STEP = {
    *("ssd_forward", "ssd_backward", "nvfp4_round_trip", "causal_conv1d_backward"),
    *("grouped_matmul", "grouped_matmul_transposed", "grouped_outer", "grouped_hidden_gradient"),
    *("splash_mha_fwd_segmented_residuals", "splash_mha_dq_segmented_no_residuals"),
    "splash_mha_dkv_segmented_no_residuals",
}


@pytest.mark.prove_tpu
def test_a_sharded_train_step_compiles_for_v5p_with_every_kernel_in_it(monkeypatch):
    config = pretrain_tiny_nvfp4.get_config()
    model = dataclasses.replace(models.kernel_tiny(), pattern="M*EE")  # the last in high precision
    config.model = to_config_dict(model)
    config.execution.compute_dtype = "bfloat16"
    config.training.mtp_depths = 0
    config.mesh.data, config.mesh.fsdp = 1, 4
    texts, compiled = [], jax.stages.Lowered.compile

    def spying(lowered, *arguments, **options):
        texts.append(lowered.as_text())
        return compiled(lowered, *arguments, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spying)
    assert plan(from_config_dict(RunConfig, config), "v5p:2x2x1")["fits"]
    names = set(re.findall(r'kernel_name = "([^"]+)"', "".join(texts)))
    assert OF_A_STEP <= names


@pytest.mark.prove_tpu
def test_supers_own_step_is_lowered_with_every_kernel_in_it(monkeypatch):
    texts = []

    def stops(lowered, *arguments, **options):
        texts.append(lowered.as_text())
        raise InterruptedError

    monkeypatch.setattr(jax.stages.Lowered, "compile", stops)
    with pytest.raises(InterruptedError):  # compiling it takes minutes
        plan(from_config_dict(RunConfig, pretrain_super_phase1.get_config()), "v5p:8x8x4")
    assert OF_A_STEP <= set(re.findall(r'kernel_name = "([^"]+)"', texts[0]))
