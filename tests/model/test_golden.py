"""Logits, losses, gradients and decoding equal transformers' own, on its own checkpoints."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.decoding.rules import Asked, Free, Rules
from nemotron_jax.decoding.speculative import Standing, draft
from nemotron_jax.decoding.step import prefill_chunk
from nemotron_jax.interop.hf_names import hub_tensors
from nemotron_jax.model.parameters import abstract_model, flatten, unflatten
from tests.golden_cases import CASES, model, reference, relative_l2, tokens
from tests.tiny_models import quick_jit

ABSOLUTE = 1e-4  # ten times what another order of the same float32 sums moves (golden README)
GRADIENT = 5e-4


def loss_and_outputs(parameters, ids, execution, mtp_factor=0.0):
    """The reference's loss, with depth 1 of MTP at `mtp_factor`, and what it was computed from."""
    output = parameters(ids, execution=execution)
    logits = parameters.logits(output.hidden)
    loss, depths = cross_entropy(logits[:, :-1], ids[:, 1:]), []
    if mtp_factor:
        depths = [parameters.mtp_logits(output.hidden, ids, depth) for depth in (1, 2)]
        loss += mtp_factor * cross_entropy(depths[0][:, :-2], ids[:, 2:])
    return loss, (logits, output, depths)


differentiate = quick_jit(
    jax.value_and_grad(loss_and_outputs, has_aux=True), static_argnames=("execution", "mtp_factor")
)


@functools.cache
def scanned(case):
    """((loss, outputs), gradient) of one program for each case; most tests read from it."""
    return differentiate(model(case), tokens(case), nj.Execution())


@functools.cache
def unrolled_with_mtp(case):
    return differentiate(model(case), tokens(case), nj.Execution(layers="unrolled"), mtp_factor=0.1)


@functools.cache
def first_row(case):
    """The output for row 0, prefilled into a cache."""
    run = quick_jit(lambda model, ids: model(ids, cache=model.init_cache(*ids.shape)))
    return run(model(case), tokens(case)[:1])


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states_equal_transformers(case):
    (_, (logits, output, _)), _ = scanned(case)
    expected = reference(case)
    assert relative_l2(logits, expected["logits"]) < ABSOLUTE
    np.testing.assert_allclose(logits, expected["logits"], atol=ABSOLUTE)
    np.testing.assert_allclose(output.hidden, expected["hidden/final"], atol=ABSOLUTE)
    assert (jnp.argmax(logits, -1) == jnp.argmax(expected["logits"], -1)).all()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_transformers(case):
    (loss, (logits, _, _)), gradient = scanned(case)
    expected = reference(case)
    assert abs(loss - expected["loss"]) < 1e-5 * expected["loss"]
    check_gradients(gradient, expected, "grad")

    labels = expected["labels_masked"][:, 1:]
    masked = cross_entropy(logits[:, :-1][labels >= 0], labels[labels >= 0])
    assert abs(masked - expected["loss_masked"]) < 1e-5 * expected["loss_masked"]


@pytest.mark.parametrize("case", CASES)
def test_router_choices_equal_transformers(case):
    expected, load = reference(case), first_row(case).router_load
    layers = sorted(int(name.split("/")[1]) for name in expected if name.endswith("/experts"))
    assert len(layers) == len(load)
    for row, layer in enumerate(layers):
        chosen = expected[f"router/{layer}/experts"].ravel()
        np.testing.assert_array_equal(load[row], np.bincount(chosen, minlength=load.shape[1]))


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_equal_transformers(case):
    """One call for prompts of different length: transformers ran the short one alone."""
    expected = reference(case)
    prompts = [*expected["prompt_ids"], *expected["short_ids"]]
    result = nj.generate(model(case), prompts, expected["greedy_tokens"].shape[1])
    for rows, prefix in ((slice(0, 2), ""), (slice(2, 3), "short_")):
        wanted = expected[f"{prefix}greedy_tokens"]
        new = slice(0, wanted.shape[1])
        np.testing.assert_array_equal(result.tokens[rows, new], wanted)
        logprobs = np.asarray(jax.nn.log_softmax(expected[f"{prefix}greedy_logits"]))
        chosen = np.take_along_axis(logprobs, wanted[..., None], -1)[..., 0]
        np.testing.assert_allclose(result.logprobs[rows, new], chosen, atol=ABSOLUTE)


@pytest.mark.parametrize("case", CASES)
def test_cache_after_prefill_equals_transformers(case):
    expected = reference(case)
    for layer, state in enumerate(first_row(case).cache.layers):
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
    (_, (_, _, depths)), _ = unrolled_with_mtp(case)
    expected, num_tokens = reference(case), tokens(case).shape[1]
    for depth, rows in ((1, slice(None)), (2, slice(0, 1))):
        logits = depths[depth - 1][rows, : num_tokens - depth]
        np.testing.assert_allclose(logits, expected[f"mtp/depth{depth}_logits"], atol=ABSOLUTE)


@pytest.mark.parametrize("case", MTP_CASES)
def test_unrolled_layers_and_mtp_loss_gradients_equal_the_reference(case):
    (loss, (logits, _, _)), gradient = unrolled_with_mtp(case)
    expected = reference(case)
    np.testing.assert_allclose(logits, expected["logits"], atol=ABSOLUTE)
    assert abs(loss - expected["mtp/total_loss"]) < 1e-5 * expected["mtp/total_loss"]
    check_gradients(gradient, expected, "mtp/grad")


@pytest.mark.parametrize("case", MTP_CASES)
def test_mtp_drafts_equal_the_reference(case):
    expected = reference(case)
    first = expected["greedy_tokens"][:, 0].astype(np.int32)
    count = expected["mtp/draft_tokens"].shape[1]

    def drafted(model, prompt):
        batch, length = prompt.shape
        cache = model.init_cache(batch, length + count, mtp=True)
        for piece in (prompt[:, :3], prompt[:, 3:]):  # an MTP entry spans their border
            cache, _ = prefill_chunk(model, cache, piece, jnp.full(batch, piece.shape[1]))
        asked = Asked.of({}, batch, Free(model.config.vocab_size))  # of rows that are greedy
        at = Standing(cache, first, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
        return draft(model, at, count, Rules.create(asked, pad=0))

    _, drafts, logits = quick_jit(drafted)(model(case), expected["prompt_ids"].astype(np.int32))
    np.testing.assert_array_equal(drafts, expected["mtp/draft_tokens"])
    np.testing.assert_allclose(logits, expected["mtp/draft_logits"], atol=ABSOLUTE)


def test_time_steps_are_clamped_only_where_the_config_says_so():
    expected, limited = reference("dt_limit"), model("dt_limit")
    mamba = dataclasses.replace(limited.config.mamba, time_step_limit=(0.0, math.inf))
    config = dataclasses.replace(limited.config, mamba=mamba)
    free = unflatten(abstract_model(config), flatten(limited))
    run = quick_jit(lambda model, ids: model.logits(model(ids).hidden))
    for clamped, name in ((limited, "clamp_time_step_limit"), (free, "no_clamp")):
        logits = run(clamped, tokens("dt_limit"))
        np.testing.assert_allclose(logits, expected[f"logits_{name}"], atol=ABSOLUTE)


def cross_entropy(logits, targets):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.mean(chosen)


def check_gradients(gradient, expected, prefix):
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
