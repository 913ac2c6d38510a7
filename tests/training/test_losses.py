"""The chunked cross entropy is the plain one, and packed documents lose what they lose apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemotron_jax.data.packing import Row, lookahead_of, make_batch
from nemotron_jax.model.parameters import flatten
from nemotron_jax.training.chunked import Chunked, cross_entropy, weighted_loss
from nemotron_jax.training.losses import pretrain_objective
from nemotron_jax.training.prepared import init_state, prepare_run
from tests.training.runs import changed, small_run

WIDTH, VOCABULARY = 12, 37


def operands(count, seed=0):
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(count, WIDTH)).astype(np.float32)
    head = generator.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    targets = generator.integers(0, VOCABULARY, count).astype(np.int32)
    weights = np.where(generator.random(count) < 0.3, 0, generator.random(count))
    return hidden, head, targets, weights.astype(np.float32)


def weighted_nll(hidden, head, targets, weights, chunk):
    return weighted_loss(hidden, head, targets, None, weights, Chunked(cross_entropy, chunk))


def plain(hidden, head, targets, weights):
    logits = jnp.dot(hidden, head, precision="highest")
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)


@pytest.mark.parametrize(("count", "chunk"), [(1, 1), (7, 3), (50, 16), (64, 16), (5, 512)])
def test_the_chunked_loss_is_the_plain_one(count, chunk):
    hidden, head, targets, weights = operands(count)
    both = lambda function: jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    chunked = lambda h, w: 1.7 * weighted_nll(h, w, targets, weights, chunk)
    value, gradients = both(chunked)(hidden, head)
    expected, wanted = both(lambda h, w: 1.7 * plain(h, w, targets, weights))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(chunked(hidden, head), expected, rtol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_rows_of_weight_zero_count_for_nothing():
    hidden, head, targets, weights = operands(20)
    weights[5:11] = 0
    gradient = jax.grad(weighted_nll)(hidden, head, targets, weights, 8)
    assert not np.any(gradient[5:11]) and np.all(np.any(gradient[weights > 0], axis=1))
    spoiled = hidden.copy()
    spoiled[5:11] = 99
    np.testing.assert_allclose(
        weighted_nll(spoiled, head, targets, weights, 8),
        weighted_nll(hidden, head, targets, weights, 8),
        rtol=1e-6,
    )
    assert weighted_nll(hidden, head, targets, 0 * weights, 8) == 0


def test_large_logits_stay_finite():
    hidden, head, targets, weights = operands(6)
    value, gradient = jax.value_and_grad(weighted_nll)(1e4 * hidden, head, targets, weights, 4)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_operands_give_float32_gradients_of_the_head():
    hidden, head, targets, weights = operands(33)
    low = jnp.asarray(hidden, jnp.bfloat16)
    value, (dhidden, dhead) = jax.value_and_grad(weighted_nll, argnums=(0, 1))(
        low, head, targets, weights, 8
    )
    exact = plain(low.astype(jnp.float32), head, targets, weights)
    assert dhidden.dtype == jnp.bfloat16 and dhead.dtype == value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=2e-2)


@pytest.fixture(scope="module")
def config():
    """The balance loss over documents, large enough to be seen."""
    return changed(
        small_run("somewhere"),
        model={"pattern": "M*E"},
        training={"aux_loss_scale": 0.1, "loss_chunk": 24},
        execution={"aux_loss": "documents"},
        data={"sequence_length": 48},
    )


@pytest.fixture(scope="module")
def model(config):
    return init_state(prepare_run(config)).model


@pytest.fixture(scope="module")
def loss_of(config, model):
    """The loss, its report and its gradients by name, of a batch."""
    objective = pretrain_objective(config.training, config.execution)
    function = jax.jit(
        jax.value_and_grad(
            lambda model, batch: objective.loss(model, batch, objective.totals(batch), None),
            has_aux=True,
        )
    )

    def evaluate(batch):
        (total, report), gradient = function(model, batch)
        return total, report, flatten(gradient)

    return evaluate


def documents(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(16, 512, length).astype(np.int32) for length in lengths]


def packed_batch(rows, length, depths=2):
    """Rows of whole documents, padded; nothing reaches past a row's end."""
    total = length + lookahead_of(depths)
    made = []
    for row in rows:
        tokens, segments = np.zeros(total, np.int32), np.zeros(total, np.int32)
        place = 0
        for number, document in enumerate(row, 1):
            tokens[place : place + len(document)] = document
            segments[place : place + len(document)] = number
            place += len(document)
        made.append(Row(tokens, segments))
    return make_batch(made, depths)


def assert_same_losses(one, other):
    (total, report, gradients), (expected, wanted, theirs) = one, other
    np.testing.assert_allclose(total, expected, rtol=2e-5)
    for name in report:
        assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, err_msg=name)
        jax.tree.map(assert_close, report[name], wanted[name])
    for name, gradient in gradients.items():
        scale = np.linalg.norm(theirs[name]) + 1e-7
        assert np.linalg.norm(gradient - theirs[name]) / scale < 5e-4, name


def test_packed_documents_are_the_documents_apart(loss_of):
    first, second, third, fourth, fifth = documents([17, 30, 1, 48, 29])
    packed = packed_batch([[first, second], [fourth], [third, fifth], [], []], 48)
    apart = packed_batch([[first], [second], [third], [fourth], [fifth]], 48)
    assert_same_losses(loss_of(packed), loss_of(apart))


def test_a_document_that_sees_its_neighbour_is_found(loss_of):
    first, second = documents([17, 30])
    apart = packed_batch([[first], [second], [], [], []], 48)
    joined = packed_batch([[np.concatenate([first, second])], [], [], [], []], 48)
    with pytest.raises(AssertionError):
        assert_same_losses(loss_of(joined), loss_of(apart))


def test_padding_changes_nothing(loss_of):
    rows = [[document] for document in documents([33, 21])]
    padded = packed_batch([*rows, [], [], []], 48)
    assert_same_losses(loss_of(packed_batch(rows, 34)), loss_of(padded))


def test_the_parts_make_the_total(loss_of, config):
    total, report, _ = loss_of(packed_batch([documents([48]), documents([20], 1), [], [], []], 48))
    training = config.training
    expected = report["loss"] + training.mtp_loss_scale * report["mtp_loss"]
    expected += training.aux_loss_scale * report["aux_loss"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert report["mtp_loss"] > 1 and report["aux_loss"] > 1


def test_router_load_counts_each_valid_token_and_every_depth(loss_of, config):
    _, report, _ = loss_of(packed_batch([documents([30]), documents([20], 1), [], [], []], 48))
    chosen = config.model.moe.experts_per_token
    (load,), (drafts,) = (report[f"{kind}router_load"].values() for kind in ("", "mtp_"))
    np.testing.assert_array_equal(load.sum(axis=-1), [50 * chosen])
    np.testing.assert_array_equal(drafts.sum(axis=-1), 2 * 50 * chosen)
