"""Logits, losses, gradients and decoding equal transformers' own, on its own checkpoints."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.decoding.drafting import draft
from nemotron_jax.interop.hf_names import hub_tensors
from nemotron_jax.model.parameters import abstract_model, flatten, unflatten
from tests.golden_cases import CASES, model, reference, relative_l2, tokens

ABSOLUTE = 1e-4  # ten times what another order of the same float32 sums moves (golden README)
GRADIENT = 5e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states_equal_transformers(case):
    output = model(case)(tokens(case))
    logits = model(case).logits(output.hidden)
    expected = reference(case)
    assert relative_l2(logits, expected["logits"]) < ABSOLUTE
    np.testing.assert_allclose(logits, expected["logits"], atol=ABSOLUTE)
    np.testing.assert_allclose(output.hidden, expected["hidden/final"], atol=ABSOLUTE)
    assert (jnp.argmax(logits, -1) == jnp.argmax(expected["logits"], -1)).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_loss_and_gradients_equal_transformers(case, layers):
    expected = reference(case)
    loss, gradient = jax.value_and_grad(_next_token_loss)(
        model(case), tokens(case), nj.Execution(layers=layers)
    )
    assert abs(loss - expected["loss"]) < 1e-5 * expected["loss"]
    _check_gradients(gradient, expected, "grad")


@pytest.mark.parametrize("case", CASES)
def test_masked_loss_equals_transformers(case):
    expected = reference(case)
    labels = expected["labels_masked"]
    loss = _next_token_loss(model(case), tokens(case), nj.Execution(), labels=labels)
    assert abs(loss - expected["loss_masked"]) < 1e-5 * expected["loss_masked"]


@pytest.mark.parametrize("case", CASES)
def test_router_choices_equal_transformers(case):
    expected = reference(case)
    layers = [int(name.split("/")[1]) for name in expected if name.endswith("/experts")]
    output = model(case)(tokens(case)[:1])
    for row, layer in enumerate(sorted(layers)):
        counts = np.bincount(
            expected[f"router/{layer}/experts"].ravel(), minlength=output.router_load.shape[1]
        )
        np.testing.assert_array_equal(output.router_load[row], counts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", ["", "short_"])
def test_greedy_continuation_equals_transformers(case, prompt):
    expected = reference(case)
    ids = expected["short_ids" if prompt else "prompt_ids"]
    wanted = expected[f"{prompt}greedy_tokens"]
    result = nj.generate(model(case), ids, max_new_tokens=wanted.shape[1])
    np.testing.assert_array_equal(result.tokens, wanted)
    logits = expected[f"{prompt}greedy_logits"]
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), wanted[..., None], -1)
    np.testing.assert_allclose(result.logprobs, chosen[..., 0], atol=ABSOLUTE)


@pytest.mark.parametrize("case", CASES)
def test_cache_after_prefill_equals_transformers(case):
    expected, ids = reference(case), tokens(case)
    cache = model(case)(ids, cache=model(case).init_cache(*ids.shape)).cache
    for layer, state in enumerate(cache.layers):
        if f"cache/{layer}/ssm" in expected:
            tails = np.concatenate([state.x_tail[0], state.b_tail[0], state.c_tail[0]], axis=-1)
            np.testing.assert_allclose(state.ssm[0], expected[f"cache/{layer}/ssm"], atol=ABSOLUTE)
            kept = expected[f"cache/{layer}/conv"][:, -tails.shape[0] :].T
            np.testing.assert_allclose(tails, kept, atol=ABSOLUTE)
        if f"cache/{layer}/k" in expected:
            for name in "kv":
                got = np.swapaxes(getattr(state, name)[0], 0, 1)
                np.testing.assert_allclose(got, expected[f"cache/{layer}/{name}"], atol=ABSOLUTE)


MTP_CASES = [case for case in CASES if "mtp/depth1_logits" in reference(case)]


@pytest.mark.parametrize("case", MTP_CASES)
def test_mtp_logits_equal_the_reference_at_both_depths(case):
    expected, ids = reference(case), tokens(case)
    hidden = model(case)(ids).hidden
    for depth, rows in ((1, slice(None)), (2, slice(0, 1))):
        logits = model(case).mtp_logits(hidden, ids, depth)[rows, : ids.shape[1] - depth]
        np.testing.assert_allclose(logits, expected[f"mtp/depth{depth}_logits"], atol=ABSOLUTE)


@pytest.mark.parametrize("case", MTP_CASES)
def test_mtp_loss_gradients_equal_the_reference(case):
    expected = reference(case)

    def total(parameters):
        main = _next_token_loss(parameters, tokens(case), nj.Execution())
        hidden = parameters(tokens(case)).hidden
        logits = parameters.mtp_logits(hidden, tokens(case), 1)[:, :-2]
        return main + 0.1 * _cross_entropy(logits, tokens(case)[:, 2:])

    loss, gradient = jax.value_and_grad(total)(model(case))
    assert abs(loss - expected["mtp/total_loss"]) < 1e-5 * expected["mtp/total_loss"]
    _check_gradients(gradient, expected, "mtp/grad")


@pytest.mark.parametrize("case", MTP_CASES)
def test_mtp_drafts_equal_the_reference(case):
    expected = reference(case)
    prompt = jnp.asarray(expected["prompt_ids"], jnp.int32)
    first = jnp.asarray(expected["greedy_tokens"][:, 0], jnp.int32)
    hidden = model(case)(prompt).hidden
    drafts, logits = draft(
        model(case), prompt, hidden, first, expected["mtp/draft_tokens"].shape[1]
    )
    np.testing.assert_array_equal(drafts, expected["mtp/draft_tokens"])
    np.testing.assert_allclose(logits, expected["mtp/draft_logits"], atol=ABSOLUTE)


def test_time_steps_are_clamped_only_where_the_config_says_so():
    expected, ids = reference("dt_limit"), tokens("dt_limit")
    limited = model("dt_limit")
    mamba = dataclasses.replace(limited.config.mamba, time_step_limit=(0.0, math.inf))
    config = dataclasses.replace(limited.config, mamba=mamba)
    free = unflatten(abstract_model(config), flatten(limited))
    for clamped, name in ((limited, "clamp_time_step_limit"), (free, "no_clamp")):
        logits = clamped.logits(clamped(ids).hidden)
        np.testing.assert_allclose(logits, expected[f"logits_{name}"], atol=ABSOLUTE)


def _cross_entropy(logits, targets):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.mean(chosen)


def _next_token_loss(parameters, ids, execution, labels=None):
    logits = parameters.logits(parameters(ids, execution=execution).hidden)[:, :-1]
    if labels is None:
        return _cross_entropy(logits, ids[:, 1:])
    targets = jnp.asarray(labels)[:, 1:]
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1
    )[..., 0]
    return -jnp.sum(chosen * (targets >= 0)) / jnp.sum(targets >= 0)


def _check_gradients(gradient, expected, prefix):
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(gradient).items()}
    hub = {t.name: t.to_hub(arrays) for t in hub_tensors(gradient.config, set(arrays))}
    for name in (n for n in expected if n.startswith(f"{prefix}/")):
        error = relative_l2(hub[name.removeprefix(f"{prefix}/")], expected[name])
        assert error < GRADIENT, f"{name}: {error}"
    totals = zip(
        expected[f"{prefix}_all/names"],
        expected[f"{prefix}_all/l2"],
        expected[f"{prefix}_all/cosdot"],
        strict=True,
    )
    for name, norm, projection in totals:
        array = hub[str(name)].astype(np.float64).ravel()
        np.testing.assert_allclose(np.linalg.norm(array), norm, rtol=GRADIENT, err_msg=name)
        cosine = np.cos(np.arange(array.size))
        np.testing.assert_allclose(
            array @ cosine, projection, atol=GRADIENT * norm * np.sqrt(array.size), err_msg=name
        )
