"""Pieces equal the whole: prefill and decode, packed documents, padding, verification of drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.layers.attention import KVState
from nemotron_jax.layers.mamba2 import MambaState
from tests.tiny_models import quick_jit, random_tokens, tiny_model

PATTERN = "ME*-M"
TOKENS = 75
LENGTHS = np.array([70, 41, 3])  # valid tokens of each row
DRAFTS = 5
CAPACITY = 128  # whole pieces, their padding included
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}  # another order of the same float32 sums moves 3e-6


@quick_jit
def run(model, tokens, lengths):
    return model(tokens, lengths=lengths)


@quick_jit
def advance(model, cache, tokens, lengths):
    return model(tokens, cache=cache, lengths=lengths)


@quick_jit
def verify(model, cache, tokens):
    return model(tokens, cache=cache, every_state=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model(PATTERN, mtp="*E")


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(1, 3, TOKENS)


@pytest.fixture(scope="module")
def whole(model, tokens):
    """The hidden states of one forward pass, by row of its own length."""
    return run(model, tokens, LENGTHS)


def in_pieces(model, tokens, size):
    """Hidden states, cache and router load after feeding the rows `size` tokens at a time."""
    cache, hidden, load = model.init_cache(len(tokens), CAPACITY), [], 0
    padded = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)))
    for start in range(0, padded.shape[1], size):
        valid = np.clip(LENGTHS - start, 0, size).astype(np.int32)
        output = advance(model, cache, padded[:, start : start + size], valid)
        cache, load = output.cache, load + output.router_load
        hidden.append(output.hidden)
    return np.concatenate(hidden, axis=1), cache, load


def assert_rows_equal(got, expected, lengths, **tolerance):
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            got[row, :length], expected[row, :length], **(tolerance or TOLERANCE)
        )


def assert_caches_equal(got, expected):
    np.testing.assert_array_equal(got.length, expected.length)
    for layer, other in zip(got.layers, expected.layers, strict=True):
        if isinstance(layer, MambaState):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), layer, other)
        if isinstance(layer, KVState):
            assert_rows_equal(layer.k, other.k, got.length)
            assert_rows_equal(layer.v, other.v, got.length)


@pytest.fixture(scope="module")
def prefilled(model, tokens):
    """Everything after a prefill in one piece."""
    return in_pieces(model, tokens, TOKENS)


@pytest.mark.parametrize("size", [1, 7, 64, TOKENS])
def test_prefill_in_pieces_and_decode_token_by_token_equal_one_forward(
    size, model, tokens, whole, prefilled
):
    hidden, cache, load = in_pieces(model, tokens, size)
    assert_rows_equal(hidden, whole.hidden, LENGTHS)
    np.testing.assert_array_equal(load, whole.router_load)
    np.testing.assert_array_equal(cache.length, LENGTHS)
    assert_caches_equal(cache, prefilled[1])


def test_rows_of_different_length_equal_each_row_alone(model, tokens, whole):
    row, length = 1, int(LENGTHS[1])
    alone = run(model, tokens[row : row + 1, :length], None)
    np.testing.assert_allclose(whole.hidden[row, :length], alone.hidden[0], **TOLERANCE)


def test_what_stands_in_padding_changes_nothing(model, tokens, whole):
    inside = np.arange(TOKENS) < LENGTHS[:, None]
    other = run(model, jnp.where(inside, tokens, random_tokens(2, 3, TOKENS)), LENGTHS)
    assert_rows_equal(other.hidden, whole.hidden, LENGTHS, atol=0)
    np.testing.assert_array_equal(other.router_load, whole.router_load)
    assert other.aux_loss == whole.aux_loss
    assert whole.router_load.sum() == LENGTHS.sum() * model.config.moe.experts_per_token


DOCUMENTS = ((13, 1, 8, 30, 11), (8, 8, 1, 1, 40))  # tokens; chunks have 8, rows 75


@quick_jit
def run_documents(model, tokens, segments):
    """Backbone and both MTP depths."""
    execution = nj.Execution(aux_loss="documents")
    output = model(tokens, segment_ids=segments, execution=execution)
    mtp = [
        model.mtp(output.hidden, tokens, depth, segments, execution=execution) for depth in (1, 2)
    ]
    return [output, *mtp]


def test_packed_documents_equal_the_documents_apart(model):
    packed, apart = np.zeros((2, 2, TOKENS), int), np.zeros((2, 10, 40), int)
    packed[0] = random_tokens(3, 2, TOKENS)  # padding holds any token
    places = []
    for row, lengths in enumerate(DOCUMENTS):
        ends = np.cumsum(lengths)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            packed[1, row, end - length : end] = number + 1
            apart[:, len(places), :length] = packed[:, row, end - length : end] > 0
            apart[0, len(places), :length] = packed[0, row, end - length : end]
            places.append((row, end - length, length))
    together = run_documents(model, *packed)
    alone = run_documents(model, *apart)
    for got, expected in zip(together, alone, strict=True):
        for document, (row, start, length) in enumerate(places):
            np.testing.assert_allclose(
                got.hidden[row, start : start + length],
                expected.hidden[document, :length],
                **TOLERANCE,
            )
        np.testing.assert_allclose(got.aux_loss, expected.aux_loss, rtol=1e-5)
    np.testing.assert_array_equal(together[0].router_load, alone[0].router_load)
    np.testing.assert_array_equal(together[1].router_load, alone[1].router_load)

    row, start, length = places[2]
    plain = run_documents(model, packed[0, row : row + 1, start : start + length], None)
    for got, expected in zip(together, plain, strict=True):
        document = got.hidden[row, start : start + length]
        np.testing.assert_allclose(document, expected.hidden[0], **TOLERANCE)


def test_going_on_from_rows_of_different_length_equals_one_forward(model, tokens, prefilled):
    more = np.asarray(random_tokens(5, 3, DRAFTS))
    longer = np.array(tokens)
    for row, length in enumerate(LENGTHS):
        longer[row, length : length + DRAFTS] = more[row]
    expected = run(model, longer, LENGTHS + DRAFTS).hidden
    got = verify(model, prefilled[1], more).hidden
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row], expected[row, length : length + DRAFTS], **TOLERANCE)


def test_selecting_a_state_equals_having_run_that_many_tokens(model, prefilled):
    start, drafts, count = prefilled[1], random_tokens(5, 3, DRAFTS), jnp.array([1, 5, 3])
    checked = verify(model, start, drafts)
    wanted = advance(model, start, drafts, count)
    assert_rows_equal(checked.hidden, wanted.hidden, np.asarray(count))
    assert_caches_equal(checked.cache.select(count), wanted.cache)
    following = random_tokens(6, 3, 1)
    after = [
        advance(model, c, following, None) for c in (checked.cache.select(count), wanted.cache)
    ]
    np.testing.assert_allclose(after[0].hidden, after[1].hidden, **TOLERANCE)


def test_selecting_from_a_cache_of_one_state_is_an_error(prefilled):
    with pytest.raises(ValueError, match="every_state=True"):
        prefilled[1].select(jnp.array([1, 1, 1]))


def test_single_layers_equal_the_stacks(model, tokens, whole):
    split = run(model.split_layers(), tokens, LENGTHS)
    assert_rows_equal(split.hidden, whole.hidden, LENGTHS)
    np.testing.assert_array_equal(split.router_load, whole.router_load)


def test_segments_exclude_a_cache_and_lengths(model, tokens):
    segments = jnp.ones_like(tokens)
    with pytest.raises(ValueError, match="segment_ids"):
        model(tokens, segment_ids=segments, lengths=jnp.array([75, 75, 75]))
    with pytest.raises(ValueError, match="segment_ids"):
        model(tokens, model.init_cache(3, CAPACITY), segments)


def test_a_cache_too_small_for_a_call_is_an_error(model, tokens):
    with pytest.raises(ValueError, match="T=75 .* capacity of 74"):
        jax.eval_shape(lambda: model(tokens, cache=model.init_cache(3, TOKENS - 1)))


@pytest.mark.parametrize(
    "ids", [[1] * 5 + [2] * 4 + [1] * 6, [0] * 9 + [1] * 6, [3] * 7 + [0, 0] + [3] * 6]
)
def test_a_change_of_segment_id_starts_a_document_for_every_mixer(ids):
    """A repeated id, padding before a document, and padding between two of one id."""
    model, row = tiny_model("M*E", "*E"), random_tokens(5, 1, 15)
    alone = model(row[:, 9:])
    packed = model(row, segment_ids=jnp.array([ids]))
    np.testing.assert_allclose(packed.hidden[:, 9:], alone.hidden, atol=2e-5)
    drafts = lambda output, tokens, segments: model.mtp_step(output.hidden, tokens, segments).hidden
    got = drafts(packed, row, jnp.array([ids]))[:, 9:]
    np.testing.assert_allclose(got, drafts(alone, row[:, 9:], None), atol=2e-5)
