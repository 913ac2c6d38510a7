"""Generation equals the model's own forward passes, row by row, stop by stop."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.decoding import lockstep, reading
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.types import Origin
from tests.tiny_models import VOCABULARY, quick_jit, random_tokens, tiny_model

ROWS = [random_tokens(n, n).tolist() for n in (21, 1, 30)]
NEW = 20
SAMPLED = {"temperature": 0.7, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return tiny_model("M*E")


@pytest.fixture(scope="module")
def greedy(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*donated")  # and then not used
        return nj.generate(model, ROWS, NEW)


@pytest.fixture(scope="module")
def sampled(model):
    return nj.generate(model, ROWS, NEW, **SAMPLED)


@quick_jit
def forward(model, tokens):
    return jax.nn.log_softmax(model.logits(model(tokens).hidden))


def predictions(model, rows, result) -> np.ndarray:
    """Log-probabilities [B, new, V] where each new token stands, by one pass over whole rows."""
    whole = np.zeros((len(rows), 64), np.int32)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
        whole[number, len(row) : len(row) + NEW] = result.tokens[number]
    found = np.asarray(forward(model, whole))
    return np.stack([found[n, len(row) - 1 :][:NEW] for n, row in enumerate(rows)])


def assert_logprobs_are_the_models(model, rows, result):
    expected = predictions(model, rows, result)
    chosen = np.take_along_axis(expected, result.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.logprobs, chosen, atol=1e-4)


def assert_greedy(model, rows, result):
    np.testing.assert_array_equal(predictions(model, rows, result).argmax(-1), result.tokens)
    assert_logprobs_are_the_models(model, rows, result)
    assert len(np.unique(result.tokens)) > 5, "one token over and over shows nothing"


def test_greedy_tokens_are_the_likeliest_of_one_forward_pass(model, greedy):
    assert_greedy(model, ROWS, greedy)
    np.testing.assert_array_equal(greedy.lengths, [NEW] * 3)
    assert greedy.tokens.shape == greedy.logprobs.shape == (3, NEW)


def test_a_prompt_of_several_prefill_chunks_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(reading, "PREFILL_CHUNK", 16)
    assert_greedy(model, ROWS, nj.generate(model, ROWS, NEW))


def test_each_row_is_generated_as_if_alone(model, greedy, sampled):
    for number in (0, 2):  # the row of one token has another bucket, and so programs of its own
        alone = nj.generate(model, [ROWS[number]], NEW)
        np.testing.assert_array_equal(alone.tokens[0], greedy.tokens[number])
        np.testing.assert_allclose(alone.logprobs[0], greedy.logprobs[number], atol=1e-5)
    alone = nj.generate(model, ROWS[:1], NEW, **SAMPLED)  # a row's key follows its number
    np.testing.assert_array_equal(alone.tokens[0], sampled.tokens[0])
    np.testing.assert_allclose(alone.logprobs[0], sampled.logprobs[0], atol=1e-5)


def test_logprobs_are_of_the_untempered_model(model, sampled):
    assert_logprobs_are_the_models(model, ROWS, sampled)


def test_a_seed_decides_the_tokens(model, sampled):
    again = nj.generate(model, ROWS, NEW, **SAMPLED)
    np.testing.assert_array_equal(again.tokens, sampled.tokens)
    other = nj.generate(model, ROWS, NEW, **{**SAMPLED, "seed": 4})
    assert (other.tokens != sampled.tokens).any(axis=1).all()


def test_a_shorter_run_is_the_beginning_of_a_longer_one(model, sampled):
    shorter = nj.generate(model, ROWS, 7, **SAMPLED)
    np.testing.assert_array_equal(shorter.tokens, sampled.tokens[:, :7])


def test_prompts_as_an_array_equal_prompts_as_lists(model, greedy):
    prompts = jnp.asarray([ROWS[0]] * 3)
    result = nj.generate(model, prompts, NEW)
    for row in range(3):
        np.testing.assert_array_equal(result.tokens[row], greedy.tokens[0])


def test_any_stop_token_ends_its_row_and_padding_follows(model, greedy):
    stops = (int(greedy.tokens[0, 3]), int(greedy.tokens[1, 6]))
    result = nj.generate(model, ROWS, NEW, stop_tokens=stops)
    for row in range(3):
        hits = np.flatnonzero(np.isin(greedy.tokens[row], stops))
        length = hits[0] + 1 if len(hits) else NEW
        assert result.lengths[row] == length
        np.testing.assert_array_equal(result.tokens[row, :length], greedy.tokens[row, :length])
        np.testing.assert_allclose(
            result.logprobs[row, :length], greedy.logprobs[row, :length], atol=1e-5
        )
        assert (result.tokens[row, length:] == model.config.pad_token).all()
        assert (result.logprobs[row, length:] == 0).all()
    assert result.lengths[0] <= 4 and result.lengths[1] <= 7


def test_default_stop_tokens_are_the_checkpoints_or_the_configs(model, greedy):
    assert default_stop_tokens(model) == (model.config.eos_token,)
    stop = int(greedy.tokens[1, 2])
    loaded = jax.tree.map(lambda leaf: leaf, model)
    loaded.origin = Origin("", "float32", stop_tokens=(stop, 11))
    assert default_stop_tokens(loaded) == (stop, 11)
    result = nj.generate(loaded, ROWS, NEW, stop_tokens=None)
    assert result.tokens[1, result.lengths[1] - 1] in (stop, 11)
    assert result.lengths[1] <= 3


def test_nothing_is_compiled_again_within_a_bucket(model, greedy, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for longest, new_tokens in ((17, 1), (25, 30), (32, 64)):
            rows = [[5], [6, 7], list(range(3, 3 + longest))]
            result = nj.generate(model, rows, new_tokens, stop_tokens=tuple(range(40, 45)))
            assert result.tokens.shape == (3, new_tokens)
        found = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not found


@pytest.mark.slow
def test_fifty_calls_compile_once_a_bucket():
    """Rows, prompts and new tokens are rounded up to powers of two, of at least 1, 16 and 64."""
    model, generator, decode = tiny_model("*-"), np.random.default_rng(0), lockstep._decode
    power = lambda count: 1 << (count - 1).bit_length()  # noqa: E731
    before, buckets = decode._cache_size(), set()
    for _ in range(50):
        rows, longest, new_tokens = (int(generator.integers(1, most)) for most in (4, 200, 100))
        lengths = [longest, *generator.integers(1, longest + 1, rows - 1)]
        nj.generate(model, [generator.integers(0, VOCABULARY, n) for n in lengths], new_tokens)
        buckets.add((power(rows), max(16, power(longest)), max(64, power(new_tokens))))
    assert decode._cache_size() - before == len(buckets) < 30


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one token"),
        ([[1, 2], []], {}, "at least one token"),
        ([[1], [2, VOCABULARY]], {}, f"prompt 1 holds token {VOCABULARY}, outside .* {VOCABULARY}"),
        ([[1, -1]], {}, "prompt 0 holds token -1"),
        ([[1], [1.5]], {}, r"prompt 1 is \[1.5\]; .* row of integer"),
        ([1, 2], {}, "prompt 0 is 1; .* row of integer"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be an integer from 1 to 16777216"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_p": 2.0}, "top_p=2.0"),
        ([[1]], {"top_k": -3}, "top_k=-3"),
        (7, {}, "prompt_tokens=7 must be rows"),
        ([[True]], {}, r"prompt 0 is \[True\]"),
        ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens=1.5: must be an integer from 1"),
        ([[1]], {"max_new_tokens": None}, "max_new_tokens=None"),
        ([[1]], {"max_new_tokens": 10**12}, "max_new_tokens=1000000000000"),
        ([[1]], {"stop_tokens": VOCABULARY}, f"outside the model's vocabulary of {VOCABULARY}"),
        ([[1]], {"stop_tokens": (2, 1.5)}, r"stop_tokens=\(2, 1.5\): must be"),
        ([[1]], {"stop_tokens": "eos"}, "stop_tokens='eos': must be"),
        ([[1]], {"stop_tokens": (VOCABULARY,)}, f"outside the model's vocabulary of {VOCABULARY}"),
        ([[1]], {"seed": -1}, "seed=-1.*0 to 4294967295"),
        ([[1]], {"seed": 10**20}, "seed=10"),
        ([[1]], {"seed": 0.5}, "seed=0.5"),
    ],
    ids=str,
)
def test_bad_calls_are_errors(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        nj.generate(model, prompts, **options)
