"""Attention equals its definition, whole or in pieces, packed or apart, and costs what it sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention import few, reference, specs, xla
from pallas_kernels.attention.keys import Dense
from pallas_kernels.attention.masks import Masks
from pallas_kernels.testing import check

F32 = 2e-6  # softmax weights sum to one, so errors stay near the rounding of float32


@pytest.mark.parametrize("case", specs.EDGE_CASES, ids=str)
def test_attention_and_gradients_equal_the_definition(case):
    arrays = {**case.arrays(), **case.rows()}
    op, definition = (
        functools.partial(f, causal=case.causal) for f in (attention, reference.attention)
    )
    check(op, definition, arrays, tolerance=F32)


def test_the_definition_runs_as_an_implementation():
    case = specs.EDGE_CASES[2]
    op = functools.partial(attention, implementation="reference")
    check(op, reference.attention, case.arrays(), tolerance=F32)


def test_bfloat16_has_float32_statistics():
    case = specs.EDGE_CASES[2]
    arrays = case.arrays(dtype=jnp.bfloat16)
    out = attention(**arrays)
    expected = reference.attention(**arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("pieces", [(150,), (1,) * 8 + (142,), (100, 37, 13), (64, 64, 22)])
def test_a_row_in_pieces_over_a_cache_equals_the_whole_row(pieces):
    case = specs.Case("row", 2, 150, heads=4, kv_heads=2, head_dim=24)
    q, k, v = case.arrays().values()
    start, outs = 0, []
    for piece in pieces:
        end = start + piece
        # The cache is longer than the row, and what lies past its filled part is not seen.
        cache = [
            np.pad(a[:, :end], ((0, 0), (0, 400 - end), (0, 0), (0, 0)), constant_values=left)
            for a, left in ((k, np.nan), (v, np.inf))
        ]
        outs.append(attention(q[:, start:end], *cache, q_offset=jnp.full(2, start, jnp.int32)))
        start = end
    whole = attention(q, k, v)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, rtol=1e-5, atol=2e-6)


def test_packed_documents_equal_the_documents_apart():
    q, k, v = specs.Case("row", 1, 300, heads=4, kv_heads=2, head_dim=24).arrays().values()
    edges = [0, 1, 90, 128, 300]
    ids = np.concatenate([np.full(b - a, i) for i, (a, b) in enumerate(zip(edges, edges[1:]))])
    packed = attention(q, k, v, segment_ids=jnp.asarray(ids[None], jnp.int32))
    apart = [attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in zip(edges, edges[1:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("ids", ["falling", "returning", "negative"])
def test_segment_ids_need_no_order(ids):
    case = specs.Case("row", 2, 400, heads=2, kv_heads=1, head_dim=24)
    rng = np.random.default_rng(1)
    rows = {
        "falling": -np.sort(-rng.integers(0, 6, (2, 400)), axis=1),
        "returning": rng.integers(0, 3, (2, 400)),
        "negative": np.repeat(rng.integers(-9, 0, (2, 8)), 50, axis=1),
    }
    arrays = {**case.arrays(), "segment_ids": rows[ids].astype(np.int32)}
    check(attention, reference.attention, arrays, tolerance=F32)


@pytest.mark.parametrize("tokens", [3, 140])
def test_key_segments_of_a_cache(tokens):
    case = specs.Case("cache", 2, tokens, 4, 1, 24, keys=500, q_offset=(300, 200))
    rng = np.random.default_rng(2)
    ids = np.sort(rng.integers(0, 4, (2, 500)), axis=1).astype(np.int32)
    own = np.stack([ids[0, 300 : 300 + tokens], ids[1, 200 : 200 + tokens]])
    arrays = {**case.arrays(), **case.rows(), "segment_ids": own, "kv_segment_ids": ids}
    check(attention, reference.attention, arrays, tolerance=F32)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits_stay_finite_and_right(size):
    case = specs.Case("huge", 1, 150, heads=2, kv_heads=1, head_dim=32)
    q, k, v = case.arrays().values()
    out, pullback = jax.vjp(attention, q * np.float32(size), k * np.float32(size), v)
    np.testing.assert_allclose(
        out, reference.attention(q * np.float32(size), k * np.float32(size), v), atol=2e-2
    )  # scores of 1e5 and more are rounded by 1e-2, and so are the weights of near ties
    assert all(np.isfinite(g).all() for g in pullback(jnp.ones_like(out)))


def test_padding_gives_zeros_and_no_gradient():
    case = specs.Case("padded", 2, 700, heads=2, kv_heads=1, head_dim=24, lengths=(650, 0))
    arrays = case.arrays()
    lengths = jnp.asarray(case.lengths)
    out, pullback = jax.vjp(functools.partial(attention, lengths=lengths), *arrays.values())
    padded = np.arange(700) >= np.asarray(case.lengths)[:, None]
    assert not np.any(np.asarray(out)[padded]) and np.any(np.asarray(out)[0, 649])
    for gradient in pullback(jnp.ones_like(out)):
        assert not np.any(np.asarray(gradient)[padded])


def test_few_queries_and_blocks_agree_and_share_their_statistics():
    """Decoding and blocked attention hand the same logsumexp to the backward pass."""
    case = specs.Case("few", 2, 8, heads=4, kv_heads=2, head_dim=24, keys=300)
    masks = Masks(jnp.asarray([100, 290]), jnp.asarray([8, 5]), None, None)
    operands = [jnp.asarray(a) for a in case.arrays().values()]
    q, k, v = operands
    one, two = (m.forward(q, Dense(k, v), masks, causal=True) for m in (few, xla))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


# A weight of zero times NaN is NaN, so a finite output beside NaN values proves blocks unread: the
# tests below see that work is skipped, and not only masked.


def gradient_of_queries(q, k, v, **rows):
    return jax.grad(lambda q: jnp.sum(attention(q, k, v, **rows) ** 2))(q)


def test_blocks_above_the_diagonal_are_never_read():
    case = specs.Case("causal", 1, 1024, heads=2, kv_heads=1, head_dim=24)
    q, k, v = (jnp.asarray(a) for a in case.arrays().values())
    poisoned = [a.at[:, 512:].set(jnp.nan) for a in (k, v)]
    np.testing.assert_array_equal(attention(q, *poisoned)[:, :256], attention(q, k, v)[:, :256])
    assert np.isfinite(gradient_of_queries(q, *poisoned)[:, :256]).all()


@pytest.mark.parametrize("tokens", [1, 128])
def test_a_cache_past_its_filled_part_is_never_read(tokens):
    case = specs.Case("cache", 1, tokens, 8, 2, 32, keys=2048, q_offset=(300 - tokens,))
    q, k, v = (jnp.asarray(a) for a in case.arrays().values())
    poisoned = [a.at[:, 512:].set(jnp.nan) for a in (k, v)]
    offset = jnp.asarray(case.q_offset)
    np.testing.assert_array_equal(
        attention(q, *poisoned, q_offset=offset), attention(q, k, v, q_offset=offset)
    )


def test_earlier_documents_are_never_read():
    case = specs.Case("packed", 1, 1024, heads=2, kv_heads=1, head_dim=24, starts=((512,),))
    q, k, v = (jnp.asarray(a) for a in case.arrays().values())
    rows = {name: jnp.asarray(value) for name, value in case.rows().items()}
    poisoned = [a.at[:, :512].set(jnp.nan) for a in (k, v)]
    np.testing.assert_array_equal(
        attention(q, *poisoned, **rows)[:, 512:], attention(q, k, v, **rows)[:, 512:]
    )
    assert np.isfinite(gradient_of_queries(q, *poisoned, **rows)[:, 512:]).all()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_linear_in_tokens(direction):
    """Four times the tokens take at most about four times the memory; scores would take sixteen."""

    def temporaries(tokens):
        f = attention if direction == "forward" else gradient_of_queries
        shapes = [jax.ShapeDtypeStruct((1, tokens, heads, 32), jnp.float32) for heads in (4, 1, 1)]
        return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) <= 4.5 * temporaries(4096)
    assert temporaries(16384) < 16384**2  # a byte a score of one head


def test_the_harness_rejects_attention_that_looks_one_token_ahead():
    def wrong(q, k, v):
        return attention(q, k, v, q_offset=jnp.ones(q.shape[0], jnp.int32))

    arrays = specs.EDGE_CASES[2].arrays()
    with pytest.raises(AssertionError, match="output"):
        check(wrong, reference.attention, arrays, tolerance=F32)


def test_the_harness_rejects_a_gradient_without_its_softmax_term():
    @jax.custom_vjp
    def wrong(q, k, v):
        return attention(q, k, v)

    def backward(operands, dout):
        dq, dk, dv = jax.vjp(attention, *operands)[1](dout)
        return dq, dk.at[:, -1].mul(1.001), dv

    wrong.defvjp(lambda *operands: (wrong(*operands), operands), backward)
    with pytest.raises(AssertionError, match="gradient of k"):
        check(wrong, reference.attention, specs.EDGE_CASES[2].arrays(), tolerance=F32)


def test_contradictions_are_errors_that_say_who_and_what():
    q, k, v = (jnp.zeros((2, 6, heads, 8)) for heads in (4, 2, 2))
    ids, offset = jnp.zeros((2, 6), jnp.int32), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="H=3 query heads do not divide over K=2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="T=4 tokens but k has S=6; pass q_offset"):
        attention(q[:, :4], k, v)
    with pytest.raises(ValueError, match="causal=False does not go with q_offset"):
        attention(q, k, v, q_offset=offset, causal=False)
    with pytest.raises(ValueError, match="kv_segment_ids needs segment_ids"):
        attention(q, k, v, kv_segment_ids=ids)
    with pytest.raises(ValueError, match="needs kv_segment_ids for its keys"):
        attention(q, k, v, segment_ids=ids, q_offset=offset)
    with pytest.raises(ValueError, match="attention: v has shape"):
        attention(q, k, v[..., 1:])
    with pytest.raises(ValueError, match="implementation='flash' does not exist"):
        attention(q, k, v, implementation="flash")
