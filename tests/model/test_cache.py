"""A cache that was put, cut, reset and selected in any order equals a fresh run of its tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.decoding.step import commit, decode_step, prefill_chunk, verify_step
from nemotron_jax.layers.attention import KVState
from nemotron_jax.model.cache import Cache
from tests.tiny_models import quick_jit, random_tokens, tiny_model

CAPACITY, ROWS, FED = 48, 3, 5
TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}  # another order of the same float32 sums moves 3e-6


@pytest.fixture(scope="module")
def model():
    return tiny_model("ME*M", mtp="*E")


@quick_jit
def feed(model, cache, tokens, lengths):
    return prefill_chunk(model, cache, tokens, lengths)[0]


@quick_jit
def verify(model, cache, tokens, count):
    cache, hidden, _ = verify_step(model, cache, tokens)
    return commit(model, cache, hidden, tokens, count)


@quick_jit
def step(model, cache, token):
    return decode_step(model, cache, token)


@quick_jit
def take_row(cache, other, row):
    return cache.put(row, other)


@quick_jit
def forget(cache, rows):
    return cache.reset(rows)


def empty(model, rows=ROWS, capacity=CAPACITY):
    return model.init_cache(rows, capacity, mtp=True)


def of_tokens(model, rows):
    """A fresh cache of whole rows, in one chunk of a fixed size."""
    tokens = np.zeros((len(rows), 32), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return feed(model, empty(model, len(rows)), tokens, np.array([len(r) for r in rows], np.int32))


def assert_same(got: Cache, expected: Cache):
    np.testing.assert_array_equal(got.length, expected.length)
    assert got.start is None
    for mine, theirs in zip(got.layers, expected.layers, strict=True):
        if isinstance(mine, KVState):
            for row, length in enumerate(np.asarray(got.length)):
                for a, b in ((mine.k, theirs.k), (mine.v, theirs.v)):
                    np.testing.assert_allclose(a[row, :length], b[row, :length], **TOLERANCE)
        else:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), mine, theirs)
    if got.mtp is not None:
        np.testing.assert_array_equal(got.mtp.length, np.maximum(np.asarray(got.length) - 1, 0))
        assert_same(got.mtp, expected.mtp)
        filled = np.asarray(got.length) > 0
        np.testing.assert_allclose(got.hidden[filled], expected.hidden[filled], **TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_operations_in_random_order_equal_a_fresh_run_of_the_same_tokens(model, seed):
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.integers(3, 53, shape).astype(np.int32)
    texts = [draw(n).tolist() for n in (4, 9, 1)]
    cache = of_tokens(model, texts)
    for _ in range(10):
        row = int(generator.integers(ROWS))
        match generator.choice(["select", "feed", "put", "reset"]):
            case "select" if all(0 < len(text) < 24 for text in texts):
                tokens = draw(ROWS, FED)
                count = generator.integers(1, FED + 1, ROWS).astype(np.int32)
                cache = verify(model, cache, tokens, count)
                texts = [t + list(new[:n]) for t, new, n in zip(texts, tokens, count, strict=True)]
            case "put":
                texts[row] = draw(int(generator.integers(1, 9))).tolist()
                alone = feed(
                    model,
                    empty(model, 1, 32),
                    np.pad(np.array([texts[row]], np.int32), ((0, 0), (0, 9 - len(texts[row])))),
                    np.array([len(texts[row])], np.int32),
                )
                cache = take_row(cache, alone, row)
            case "reset":
                texts[row] = []
                cache = forget(cache, np.arange(ROWS) == row)
            case _ if all(len(text) < 24 for text in texts):
                lengths = generator.integers(0, FED + 1, ROWS).astype(np.int32)
                tokens = draw(ROWS, FED)
                cache = feed(model, cache, tokens, lengths)
                texts = [
                    t + list(new[:n]) for t, new, n in zip(texts, tokens, lengths, strict=True)
                ]
    assert_same(cache, of_tokens(model, texts))


def test_a_cut_cache_of_attention_goes_on_as_if_never_longer():
    model = tiny_model("*E")
    texts = random_tokens(2, 2, 12)
    whole = feed(model, model.init_cache(2, 20), texts, np.array([12, 9], np.int32))
    cut = whole.truncate(jnp.array([5, 20]))
    np.testing.assert_array_equal(cut.length, [5, 9])
    fresh = feed(model, model.init_cache(2, 20), texts, np.array([5, 9], np.int32))
    following = random_tokens(3, 2)
    got, expected = (step(model, cache, following) for cache in (cut, fresh))
    np.testing.assert_allclose(got[1], expected[1], **TOLERANCE)


def test_truncating_after_a_verification_selects(model):
    cache = dataclasses.replace(of_tokens(model, [[4, 5, 6], [7, 8]]), mtp=None, hidden=None)
    tokens = random_tokens(4, 2, FED)
    checked = quick_jit(lambda m, c, t: verify_step(m, c, t)[0])(model, cache, tokens)
    cut = checked.truncate(jnp.array([5, 3]))
    assert_same(cut, checked.select(jnp.array([2, 1])))
    with pytest.raises(ValueError, match="a Mamba state does not go back"):
        cut.truncate(jnp.array([1, 1]))


def test_a_row_written_past_its_end_is_refused_or_marked(model):
    cache = of_tokens(model, [[4] * 30, [5] * 3])
    with pytest.raises(ValueError, match=r"T=19 tokens after 30 exceed .* capacity of 48"):
        model(random_tokens(1, 2, 19), cache=cache)
    inside = feed(model, cache, random_tokens(1, 2, 19), np.array([2, 2], np.int32))
    np.testing.assert_array_equal(inside.overflowed(), [True, False])
    again = feed(model, inside, random_tokens(1, 2, 5), np.array([1, 1], np.int32))
    np.testing.assert_array_equal(again.overflowed(), [True, False])
    assert not forget(again, np.array([True, False])).overflowed().any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": np.array([13, 2])}, "lengths hold 13, and rows have 12 tokens"),
        ({"lengths": np.array([2, -1])}, "lengths hold -1"),
        ({"lengths": np.array([2])}, r"lengths are .* integers of shape \(2,\)"),
        ({"lengths": np.array([2.0, 3.0])}, "lengths are float64 .* must be an array of integers"),
        ({"lengths": 5}, "lengths are 5 and must be an array of integers"),
        ({"segment_ids": np.ones((2, 5), np.int32)}, r"integers of shape \(2, 12\)"),
        (
            {"segment_ids": np.ones((2, 12))},
            r"segment_ids are float64 of shape \(2, 12\) and must be",
        ),
        ({"tokens": np.ones(12, np.int32)}, r"int32 of shape \(12,\) and must be"),
        ({"tokens": np.ones((2, 12))}, "tokens are float64 of shape"),
        ({"tokens": [[1, 2]]}, r"tokens are \[\[1, 2\]\] and must be an array"),
        ({"tokens": np.ones((3, 4), np.int32)}, "3 rows of tokens and a cache of 2 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_calls_that_cannot_be_right_are_refused(model, options, words):
    """With a cache, lengths past the row would leave states of tokens that were never read."""
    tokens = options.get("tokens", np.ones((2, 12), np.int32))
    cache = None if "segment_ids" in options else model.init_cache(2, CAPACITY)
    rest = {name: value for name, value in options.items() if name != "tokens"}
    with pytest.raises(ValueError, match=words):
        model(tokens, cache, **rest)


def test_caches_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="other parts"):
        empty(model).put(0, model.init_cache(1, CAPACITY))
    with pytest.raises(ValueError, match="has capacity 64, this one 48"):
        empty(model).put(0, empty(model, 1, 64))
    with pytest.raises(ValueError, match="dtype='fp8': must be one of float32, bfloat16"):
        model.init_cache(1, 4, dtype="fp8")
    with pytest.raises(ValueError, match="needs a model with an MTP block"):
        tiny_model("M").init_cache(1, 4, mtp=True)
