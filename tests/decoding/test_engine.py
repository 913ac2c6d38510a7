"""Whatever runs beside a request, its tokens are those of `generate` for it alone."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.decoding.engine import QueueFull
from nemotron_jax.decoding.stopping import StopText
from tests.decoding import engines
from tests.decoding.engines import (
    GREEDY,
    LENGTHS,
    NEW,
    PROMPTS,
    WAYS,
    alone,
    assert_alone,
    assert_empty,
    log_probabilities,
    make,
    quick_programs,  # noqa: F401  # for all of this file
    submit,
)
from tests.decoding.fake_runner import expected
from tests.tiny_models import VOCABULARY, quick_jit, tiny_model


@pytest.fixture(scope="module")
def model():
    return engines.old_model()


@pytest.fixture(scope="module")
def other_model():
    return engines.new_model()


@pytest.mark.parametrize("speculative", [0, 2])
def test_each_request_is_as_if_alone(model, speculative, caplog):
    """More requests than slots, of all lengths, greedy and sampled, in programs that are there."""
    engine = make(model, speculative)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        programs = engine.stats().programs
        asked = [(n, n % len(WAYS), NEW - n) for n in range(len(PROMPTS))]
        requests = [
            submit(engine, PROMPTS[n], max_new_tokens=new, **WAYS[way]) for n, way, new in asked
        ]
        engine.run()
        assert engine.stats().programs == programs
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    for request, (n, way, new) in zip(requests, asked, strict=True):
        assert (len(request.tokens), request.finish_reason) == (new, "length")
        assert_alone(request, alone(n, way, speculative))
        assert request.versions == ["old"] * new
    stats = engine.stats()
    assert stats.finished == len(asked) and stats.prompt_tokens == sum(LENGTHS)
    assert stats.new_tokens == sum(new for *_, new in asked)
    if speculative:  # neither rejection nor acceptance alone shows much
        assert 1.2 < stats.acceptance.mean_length < 2.8
    assert_empty(engine)


@pytest.mark.parametrize("speculative", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_samples_of_one_prompt_read_it_once(model, speculative):
    engine = make(model, speculative)
    beside = submit(engine, PROMPTS[0], max_new_tokens=20, temperature=0.0)
    samples = submit(engine, PROMPTS[3], max_new_tokens=NEW, n=4, prompt_logprobs=True, **WAYS[1])
    engine.run()
    rows = nj.generate(model, [PROMPTS[3]] * 4, NEW, speculative=speculative, **WAYS[1])
    for row, sample in enumerate(samples):
        assert_alone(sample, (rows.tokens[row].tolist(), rows.logprobs[row]))
    assert len({tuple(sample.tokens) for sample in samples}) == 4
    assert engine.stats().prompt_tokens == len(PROMPTS[3]) + len(PROMPTS[0])
    expected = log_probabilities(model, jnp.asarray([PROMPTS[3]]))[0]
    expected = expected[np.arange(12), PROMPTS[3][1:]]
    for sample in samples:
        np.testing.assert_allclose(sample.prompt_logprobs, expected, atol=2e-5)
    assert beside.prompt_logprobs is None
    assert_empty(engine)


def test_stop_tokens_and_stop_strings_end_a_request(model):
    tokenizer = train_tokenizer([], 272)
    engine = make(model, tokenizer=tokenizer)
    tokens, _ = alone(0, 0, 0)
    place = next(n for n in range(4, NEW) if tokens[n] >= 16 and tokens[n - 1] >= 16)
    string = tokenizer.decode(tokens[place - 1 : place + 1])
    first = next(n for n in range(NEW) if string in tokenizer.decode(tokens[: n + 1]))
    by_string = submit(
        engine, PROMPTS[0], max_new_tokens=NEW, stop_strings=("never", string), **GREEDY
    )
    unused = next(token for token in range(VOCABULARY) if token not in tokens)
    by_token = submit(
        engine, PROMPTS[0], max_new_tokens=NEW, stop_tokens=(tokens[5], unused), **GREEDY
    )
    engine.run()
    assert by_string.tokens == tokens[: first + 1] and by_string.finish_reason == "stop"
    assert by_token.tokens == tokens[: tokens.index(tokens[5]) + 1]
    assert by_token.finish_reason == "stop" and len(by_token.logprobs) == len(by_token.tokens)
    assert_empty(engine)


def stops(tokenizer, tokens: list[int], *strings: str) -> int | None:
    """Which of the tokens is the first where the text holds one of the strings."""
    watch = StopText(tokenizer, strings)
    return next((n for n, token in enumerate(tokens) if watch.push(token)), None)


def test_a_stop_string_finds_special_tokens_whole_or_not_at_all():
    tokenizer = train_tokenizer([], 272)
    write = tokenizer.encode
    special = tokenizer.token_id
    text = [
        *write("a"),
        special("<think>"),
        *write("a"),
        special("</think>"),
        special("<|im_end|>"),
    ]
    for string, place in (("</think>", 3), ("a</think>", 3), ("</think><|im_end|>", 4)):
        assert stops(tokenizer, text, "never", string) == place
    for string in ("aa", "<", ">", "think", "im_end", "a<", "</think>a", "<think></think>"):
        assert stops(tokenizer, text, string) is None
    assert stops(tokenizer, write("a</think>"), "</think>") == len("a</think>") - 1, "as plain text"
    assert stops(tokenizer, [*write("é")[:1], special("<think>")], "\ufffd<think>") == 1


def test_acceptance_counts_no_draft_past_a_stop_string(fake):
    tokenizer = train_tokenizer([], 272)
    engine = fake(3, tokenizer=tokenizer, max_length=99, rounds=8)
    tokens = expected(submit(engine, [5], temperature=1.0, max_new_tokens=60), 3)[0]
    engine.run()
    whole = engine.stats().acceptance
    string = tokenizer.decode(tokens[20:23])
    assert len(string) == 3, "three bytes"
    cut = submit(engine, [5], temperature=1.0, max_new_tokens=60, stop_strings=string).wait()
    assert len(cut.tokens) < 60 and cut.tokens == tokens[: len(cut.tokens)]
    found = engine.stats().acceptance
    rounds = (found.drafted - whole.drafted) / 3
    given = found.mean_length * found.drafted / 3 - whole.mean_length * whole.drafted / 3
    assert given == pytest.approx(len(cut.tokens) - 1) and rounds < given <= 4 * rounds


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint32, np.int64])
def test_numbers_of_numpy_are_taken_as_those_of_python(fake, kind):
    most = int(np.iinfo(kind).max)
    sizes = {"slots": kind(3), "max_length": kind(100), "page_tokens": kind(4), "rounds": kind(100)}
    engine = fake(kind(2), pages=None, prefill_shapes=((kind(2), kind(120)),), **sizes)
    request = submit(engine, np.arange(9, dtype=kind), max_new_tokens=kind(91), seed=kind(7))
    assert (request.wanted.max_new_tokens, request.wanted.seed) == (91, 7)
    assert {type(request.wanted.max_new_tokens), type(request.wanted.seed)} == {int}
    assert len(request.wait().tokens) == 91 and engine.stats().pages == 75
    with pytest.raises(ValueError, match="exceed max_length=100|must be an integer from 1"):
        submit(engine, [5], max_new_tokens=kind(most))
    submit(engine, [5], max_new_tokens=kind(2), top_k=kind(most), stop_tokens=kind(5), n=kind(2))
    engine.run()


def test_tokens_come_while_others_still_run(model):
    engine = make(model)
    first, second = (submit(engine, PROMPTS[n], max_new_tokens=NEW, **GREEDY) for n in (1, 2))
    stream = iter(first)
    head = [next(stream) for _ in range(2)]
    assert not second.done
    assert head + list(stream) == alone(1, 0, 0)[0]
    assert second.wait().tokens == alone(2, 0, 0)[0]
    assert submit(engine, [5], max_new_tokens=1).wait().finish_reason == "length"


def test_what_must_wait_waits_until_the_queue_is_full(model):
    engine = make(model, max_waiting=3)
    requests = [submit(engine, PROMPTS[0], max_new_tokens=NEW) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests wait and 1 more would exceed max_waiting=3"):
        submit(engine, PROMPTS[0], max_new_tokens=NEW)
    engine.step()
    assert engine.stats().running == 2, "each needs 5 of the 14 pages"
    engine.run()
    assert all(request.done for request in requests)
    assert_empty(engine)


def test_what_can_never_fit_is_refused(fake):
    with pytest.raises(ValueError, match="16 prompt tokens and max_new_tokens=25 exceed .*=40"):
        submit(fake(), PROMPTS[0], max_new_tokens=25)
    with pytest.raises(ValueError, match="need 4 pages, and the engine has 3"):
        submit(fake(pages=3), PROMPTS[0], max_new_tokens=9)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "row of at least one integer"),
        ([1, [2]], {}, "row of at least one integer"),
        ([1.5], {}, "row of at least one integer"),
        ([1, VOCABULARY], {}, f"token {VOCABULARY}, outside .* {VOCABULARY}"),
        ([1, -1], {}, "token -1, outside"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0: must be"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens=2.5: must be"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"temperature": [1.0, 2.0]}, "must be one value"),
        ([1], {"top_p": 0}, "top_p=0"),
        ([1], {"top_k": -1}, "top_k=-1"),
        ([1], {"seed": -1}, "seed=-1: must be"),
        ([1], {"n": 0}, "n=0 must be"),
        ([1], {"stop_tokens": list(range(17))}, "at most 16 token ids"),
        ([1], {"stop_tokens": (VOCABULARY,)}, f"vocabulary of {VOCABULARY}"),
        ([1], {"stop_strings": ("",)}, "not empty"),
        ([1], {"stop_strings": ("a", "\ud800")}, "half of a surrogate pair"),
        ([1], {"stop_strings": ("x",)}, "make the engine with a tokenizer"),
    ],
    ids=str,
)
def test_bad_requests_are_errors(fake, prompt, options, message):
    engine = fake()
    with pytest.raises(ValueError, match=message):
        submit(engine, prompt, **{"max_new_tokens": 4, **options})
    assert_empty(engine)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 0}, "slots=0"),
        ({"page_tokens": 2.5}, "page_tokens=2.5"),
        ({"speculative": 99}, "speculative=99: must be an integer from 0 to 32"),
    ],
    ids=str,
)
def test_bad_engines_are_errors(fake, options, message):
    with pytest.raises(ValueError, match=message):
        fake(**options)


def test_new_weights_go_on_from_the_old_caches(model, other_model):
    engine = make(model)
    request = submit(engine, PROMPTS[0], max_new_tokens=20, **GREEDY)
    while len(request.tokens) < 6:
        engine.step()
    engine.replace_weights(other_model, "new")
    engine.run()
    swapped = request.versions.index("new")
    assert request.versions == ["old"] * swapped + ["new"] * (20 - swapped)
    whole = jnp.asarray([PROMPTS[0] + request.tokens], jnp.int32)
    held = len(PROMPTS[0]) + swapped - 1  # the newest token is not in the cache
    cache, _ = read(model, model.init_cache(1, 80), whole, jnp.array([held]))
    _, found = read(other_model, cache, jnp.roll(whole, -held, axis=1), jnp.array([20]))
    found = np.asarray(found)[0, : 20 - swapped]
    np.testing.assert_array_equal(found.argmax(-1), request.tokens[swapped:])
    chosen = np.take_along_axis(found, np.array(request.tokens[swapped:])[:, None], -1)[:, 0]
    np.testing.assert_allclose(request.logprobs[swapped:], chosen, atol=2e-5)
    with pytest.raises(ValueError, match="another engine"):
        engine.replace_weights(tiny_model("M*E"), "other")


@quick_jit
def read(model, cache, tokens, lengths):
    output = model(tokens, cache=cache, lengths=lengths)
    return output.cache, jax.nn.log_softmax(model.logits(output.hidden))
