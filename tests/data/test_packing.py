"""Rows lose and repeat nothing: each pair of context and target of a document occurs once."""

from collections import Counter

import numpy as np
import pytest

from nemotron_jax.data.packing import (
    DocumentTokens,
    Row,
    Stream,
    count_rows,
    empty_row,
    lookahead_of,
    make_batch,
    pack_once,
)


def make_documents(lengths, first=1, dtype=np.uint16):
    """Documents whose tokens are all different, so that a token names its place."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return DocumentTokens(np.arange(first, first + offsets[-1]).astype(dtype), offsets)


def random_documents(seed, count=23):
    generator = np.random.default_rng(seed)
    lengths = generator.choice([1, 2, 3, 5, 17, 64], size=count)
    return make_documents(lengths, first=10)


def pairs_of(documents, shift):
    """Every (token, token `shift` further on in its document), from the definition."""
    pairs = Counter()
    for begin, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        own = documents.tokens[begin:end].tolist()
        pairs.update(zip(own, own[shift:], strict=False))
    return pairs


def pairs_in(batch, depth):
    scored = batch.weights[..., depth] == 1
    tokens, targets = batch.tokens[scored], batch.targets[..., depth][scored]
    return Counter(zip(tokens.tolist(), targets.tolist(), strict=True))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("depths", [0, 1, 3])
def test_each_pair_of_an_epoch_is_scored_exactly_once(length, depths):
    documents = random_documents(length)
    stream, total = Stream(documents, seed=3), len(documents.tokens)
    epochs = length // np.gcd(length, total)  # whole rows that end where an epoch ends
    rows = [
        stream.row(r, length, lookahead_of(depths)) for r in range(int(epochs) * total // length)
    ]
    batch = make_batch(rows, depths)
    assert (batch.segment_ids[:, 0] == 1).all() and batch.segment_ids.min() == 1  # no padding
    assert Counter(batch.tokens.ravel().tolist()) == Counter(
        {token: epochs for token in documents.tokens.tolist()}
    )
    for depth in range(1 + depths):
        expected = pairs_of(documents, 1 + depth)
        assert pairs_in(batch, depth) == Counter({pair: epochs for pair in expected})
        unscored = batch.weights[..., depth] == 0
        assert not batch.targets[..., depth][unscored].any()


@pytest.mark.parametrize("depths", [1, 3])
def test_mtp_inputs_are_the_tokens_between_context_and_target(depths):
    documents = random_documents(5)
    stream = Stream(documents, seed=0)
    batch = make_batch([stream.row(r, 11, lookahead_of(depths)) for r in range(60)], depths)
    assert batch.mtp_tokens.shape == (60, 11, depths)
    for depth in range(1, 1 + depths):
        inputs = batch.mtp_tokens[..., depth - 1]
        present = inputs > 0
        pairs = zip(batch.tokens[present].tolist(), inputs[present].tolist(), strict=True)
        assert set(pairs) == set(pairs_of(documents, depth))
        assert present[batch.weights[..., depth] == 1].all()


def test_segments_count_the_documents_of_a_row():
    documents = make_documents([3, 1, 4])
    stream = Stream(documents, seed=1)
    order = stream.order(0)
    row = stream.read(0, 8)
    expected = np.concatenate(
        [documents.tokens[documents.offsets[d] : documents.offsets[d + 1]] for d in order]
    )
    np.testing.assert_array_equal(row.tokens, expected)
    lengths = np.diff(documents.offsets)[order]
    np.testing.assert_array_equal(row.segments, np.repeat([1, 2, 3], lengths))
    assert stream.read(int(lengths[0]) - 1, 3).segments.tolist()[:2] == [1, 2]


def test_a_document_that_goes_on_is_a_new_segment_with_its_last_target_kept():
    stream = Stream(make_documents([10]), seed=0)
    batch = make_batch([stream.row(0, 4, 2), stream.row(1, 4, 2), stream.row(2, 4, 2)], 1)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 1, 2]]
    assert batch.segment_ids.tolist() == [[1] * 4, [1] * 4, [1, 1, 2, 2]]
    assert batch.targets[..., 0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 0, 2, 3]]
    assert batch.targets[..., 1].tolist() == [[3, 4, 5, 6], [7, 8, 9, 10], [0, 0, 3, 4]]
    assert batch.mtp_tokens[..., 0].tolist() == batch.targets[..., 0].tolist()
    assert batch.weights[2].tolist() == [[1, 0], [0, 0], [1, 1], [1, 1]]
    types = {
        name: getattr(batch, name).dtype
        for name in batch.__dataclass_fields__
        if name != "numbers"  # which the train step gives
    }
    assert types.pop("weights") == np.float32 and set(types.values()) == {np.dtype(np.int32)}


def test_any_read_is_a_piece_of_one_stream():
    documents = random_documents(8)
    stream = Stream(documents, seed=4)
    whole = stream.read(0, 5 * len(documents.tokens)).tokens
    generator = np.random.default_rng(0)
    for start in generator.integers(0, 4 * len(documents.tokens), 50):
        count = int(generator.integers(1, len(documents.tokens)))
        np.testing.assert_array_equal(
            Stream(documents, seed=4).read(int(start), count).tokens, whole[start : start + count]
        )


def test_the_order_differs_by_epoch_seed_and_source_and_not_by_run():
    documents = make_documents([1] * 100)
    orders = {
        (seed, source, epoch): tuple(Stream(documents, seed, source).order(epoch).tolist())
        for seed in (0, 1, -1, 2**40)
        for source in (0, 1)
        for epoch in (0, 1, 10**6)
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    # written down: a change of the hash would change every resumed run
    assert Stream(make_documents([1] * 10), seed=0).order(0).tolist() == [
        0,
        1,
        9,
        4,
        2,
        3,
        6,
        8,
        7,
        5,
    ]


def test_places_in_the_order_are_uniform():
    documents = make_documents([1] * 8)
    counts = np.zeros((8, 8))
    for seed in range(2000):
        counts[Stream(documents, seed).order(0), np.arange(8)] += 1
    chi_squared = ((counts - 250) ** 2 / 250).sum()
    assert chi_squared < 90  # 49 degrees of freedom; p = 0.0003


@pytest.mark.parametrize("length", [4, 50, 4000])
def test_held_out_rows_cover_every_document_once(length):
    documents, depths = random_documents(2, count=40), 2
    rows = pack_once(documents, length, lookahead_of(depths), 10**9)
    assert len(rows) == count_rows(documents, length) == -(-len(documents.tokens) // length)
    batch = make_batch([*rows, empty_row(length, lookahead_of(depths))], depths)
    padding = batch.segment_ids == 0
    assert padding.sum() == batch.tokens.size - len(documents.tokens)
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # only at row ends
    assert sorted(batch.tokens[~padding].tolist()) == documents.tokens.tolist()
    assert not batch.weights[padding].any() and not batch.targets[padding].any()
    for depth in range(1 + depths):
        assert pairs_in(batch, depth) == pairs_of(documents, 1 + depth)
    fewer = pack_once(documents, length, lookahead_of(depths), 3)
    assert len(fewer) == min(3, len(rows))
    for few, row in zip(fewer, rows, strict=False):
        np.testing.assert_array_equal(few.tokens, row.tokens)


def test_large_ids_survive():
    documents = make_documents([5, 6], first=100_000, dtype=np.uint32)
    assert make_batch([Stream(documents, 0).row(0, 8, 1)], 0).targets.max() > 100_000


def test_padding_zero_and_token_zero_are_told_apart_by_segments():
    row = Row(np.array([0, 0, 0, 0], np.int32), np.array([1, 1, 0, 0], np.int32))
    batch = make_batch([row], 0)
    assert batch.weights[0, :, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("offsets", [[0], [0, 3, 3, 5], [0, 4], [1, 5], [0, 5, 4]])
def test_offsets_that_do_not_cut_the_tokens_are_an_error(offsets):
    with pytest.raises(ValueError, match="do not cut 5 tokens"):
        DocumentTokens(np.arange(5), np.array(offsets))
