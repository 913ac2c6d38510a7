"""What a request may want, whoever serves it: engine and lockstep, with drafts and without."""

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.decoding import lockstep, reading
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.rules import Asked, Free, Rules, forced, rounds_under
from nemotron_jax.decoding.wanted import Budget, Wanted
from tests.decoding.engines import (  # noqa: F401
    NEW,
    PROMPTS,
    alone,
    log_probabilities,
    make,
    old_model,
    quick_programs,
)
from tests.tiny_models import VOCABULARY

CLOSING = 50  # which the model never gives here by itself
SAMPLED = {"temperature": 0.8, "seed": 3}
KINDS = [("engine", 0), ("engine", 2), ("lockstep", 0), ("lockstep", 2)]


@pytest.fixture(scope="module")
def generators() -> dict:
    """Two engines and two locksteps, by kind and drafts."""
    model = old_model()
    engines = {("engine", k): make(model, k) for k in (0, 2)}
    return engines | {("lockstep", k): Lockstep(model, speculative=k) for k in (0, 2)}


def served(generator, asked: list[tuple[int, Wanted]]) -> list[Request]:
    """Requests for prompts by number, all at once."""
    found = [r for n, wanted in asked for r in generator.submit(PROMPTS[n], wanted)]
    generator.run()
    return found


def told(request: Request) -> np.ndarray:
    """Log-probabilities [new, V] where each new token stands, by one pass over the whole text."""
    whole = np.zeros((1, 40), np.int32)
    text = [*request.prompt, *request.tokens]
    whole[0, : len(text)] = text
    found = np.array(log_probabilities(old_model(), whole))[0]
    return found[len(request.prompt) - 1 :][: len(request.tokens)]


def of_tokens(values: np.ndarray, tokens: list[int]) -> np.ndarray:
    return np.take_along_axis(values, np.array(tokens)[:, None], -1)[:, 0]


class Cycle:
    """A grammar that lets one token of a list follow after another, and then nothing."""

    def __init__(self, *allowed: tuple[int, ...]) -> None:
        self.allowed, self.heard = list(allowed), []

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-VOCABULARY // 32), np.uint32)
        for token in self.allowed[len(self.heard)]:
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def accept(self, token: int) -> bool:
        self.heard.append(token)
        return len(self.heard) < len(self.allowed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_budget_closes_the_reasoning_once_and_changes_no_other_row(generators, kind):
    greedy = alone(0, 0, 0)[0]
    budgets = (0, 1, 5, NEW - 1)
    asked = [(0, Wanted(NEW, budget=Budget(tokens, CLOSING))) for tokens in budgets]
    own = greedy[3]  # a reasoning that the model itself closes is left alone
    asked += [(0, Wanted(NEW, budget=Budget(greedy.index(own) + 2, own))), (0, Wanted(NEW))]
    *bounded, closed, free = served(generators[kind], asked)
    for tokens, request in zip(budgets, bounded, strict=True):
        assert request.tokens[:tokens] == greedy[:tokens]
        assert request.tokens[tokens] == CLOSING
        assert request.forced == [place == tokens for place in range(NEW)]
        expected = told(request)
        np.testing.assert_allclose(request.logprobs, of_tokens(expected, request.tokens), atol=2e-5)
        after = expected[tokens + 1 :].argmax(-1)
        np.testing.assert_array_equal(after, request.tokens[tokens + 1 :])
    for request in (closed, free):
        assert request.tokens == greedy and not any(request.forced)


def test_a_budget_that_ends_within_a_round_heeds_what_the_round_closes_itself():
    """Rows of one round of three tokens: closed before its place, at it, never, and cut short."""
    wanted = Wanted(NEW, budget=Budget(6, CLOSING))
    asked = {row: Request((1,), wanted, 0, lambda: False) for row in range(4)}
    rules = Rules.create(Asked.of(asked, 4, Free(VOCABULARY)), pad=0)
    tokens = np.array([[CLOSING, 3, 4], [2, CLOSING, 4], [2, 3, 4], [2, 3, 4]], np.int32)
    accepted, given = np.array([2, 2, 2, 0]), np.full(4, 5)  # the budget ends at the second token
    found, kept, put = forced(tokens, accepted, rules, given, np.ones(4, bool))
    np.testing.assert_array_equal(put, [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(kept, [2, 2, 1, 0])
    np.testing.assert_array_equal(found[2], [2, CLOSING, 4])
    np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(tokens, 2, axis=0))
    closed, kept, put = forced(tokens, accepted, rules, given, np.zeros(4, bool))
    assert not put.any() and (closed == tokens).all() and (kept == accepted).all()


def test_a_grammar_alone_holds_rounds_back():
    plain, ruled = (
        Request((1,), Wanted(NEW, grammar=grammar), 0, lambda: False)
        for grammar in (None, Cycle((1,)))
    )
    assert rounds_under([plain], 8) == 8 and rounds_under([plain, ruled], 8) == 0
    ruled.tokens.append(1)
    assert rounds_under([plain, ruled], 8) == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logprobs_drawn_are_of_what_was_drawn_from(generators, kind):
    ways = {"temperature": 0.7, "top_k": 9, "min_p": 0.05, "seed": 5}
    budget = Budget(6, CLOSING)
    wanted = Wanted(NEW, logprobs="drawn", top_logprobs=4, budget=budget, **ways)
    [request] = served(generators[kind], [(4, wanted)])
    model = told(request)
    scaled = model / 0.7
    kept = scaled >= scaled.max(-1, keepdims=True) + np.log(0.05)
    kept &= scaled >= -np.sort(-scaled, axis=-1)[:, 8:9]
    drawn = np.asarray(jax.nn.log_softmax(np.where(kept, scaled, -np.inf), axis=-1))
    expected = of_tokens(drawn, request.tokens)
    expected[6] = model[6, CLOSING]  # nothing was drawn there
    np.testing.assert_allclose(request.logprobs, expected, atol=5e-5)
    for place, pairs in enumerate(request.top_logprobs):
        tokens, values = zip(*pairs, strict=True)
        np.testing.assert_allclose(values, -np.sort(-model[place])[:4], atol=2e-5)
        np.testing.assert_allclose(model[place, list(tokens)], values, atol=2e-5)
    assert len(request.top_logprobs) == NEW


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_biases_and_early_stops_act_on_their_own_rows(generators, kind):
    greedy = alone(1, 0, 0)[0]
    stop, never = greedy[2], greedy[0]
    asked = [
        (1, Wanted(NEW, stop_tokens=(stop,))),
        (1, Wanted(NEW, stop_tokens=(stop,), min_tokens=7)),
        (1, Wanted(NEW, logit_bias={never: -1e9, 7: 2.5})),
        (1, Wanted(NEW)),
    ]
    stopped, later, biased, plain = served(generators[kind], asked)
    assert plain.tokens == greedy
    assert stopped.tokens == greedy[: greedy.index(stop) + 1]
    assert stop not in later.tokens[:7] and len(later.tokens) >= 8
    expected = told(later)
    expected[:7, stop] = -np.inf
    np.testing.assert_array_equal(expected.argmax(-1), later.tokens)
    model = told(biased)
    shaped = model.copy()
    shaped[:, never], shaped[:, 7] = -np.inf, shaped[:, 7] + 2.5
    np.testing.assert_array_equal(shaped.argmax(-1), biased.tokens)
    np.testing.assert_allclose(biased.logprobs, of_tokens(model, biased.tokens), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_grammar_decides_what_may_come_and_others_are_unchanged(generators, kind):
    allowed = [(5, 9), (1,), tuple(range(20, 40)), (7, 8)]
    broken = Cycle((3,), (4,))
    broken.mask = lambda: np.zeros(3, np.int32)
    asked = [
        (2, Wanted(NEW, grammar=Cycle(*allowed), **SAMPLED)),
        (2, Wanted(NEW, grammar=broken)),
        (2, Wanted(NEW)),
    ]
    ruled, failed, free = served(generators[kind], asked)
    assert ruled.finish_reason == "stop" and len(ruled.tokens) == len(allowed)
    assert all(token in some for token, some in zip(ruled.tokens, allowed, strict=True))
    assert ruled.wanted.grammar.heard == ruled.tokens
    assert failed.finish_reason == "stop" and "must be uint32" in failed.error
    assert free.tokens == alone(2, 0, 0)[0]


def test_a_batch_goes_on_with_its_own_texts():
    """What a row holds is not read again, and tokens are those of a whole prompt."""
    model = old_model()
    kept = Lockstep(model, max_length=40, speculative=2)
    texts = [list(PROMPTS[n]) for n in (3, 4)]
    for turn in range(3):
        before = kept.stats().prompt_tokens
        wanted = Wanted(4, **SAMPLED)
        found = [r for text in texts for r in kept.submit(text, wanted)]
        kept.run()
        read = kept.stats().prompt_tokens - before
        assert read == sum(map(len, texts)) if not turn else read < 2 * 8
        for text, request in zip(texts, found, strict=True):
            [again] = Lockstep(model, speculative=2).submit(text, wanted)
            assert again.wait().tokens == request.tokens
            np.testing.assert_allclose(again.logprobs, request.logprobs, atol=2e-5)
            text += [*request.tokens, 9, turn]
    kept.replace_weights(model, "new")
    before = kept.stats().prompt_tokens
    [request] = kept.submit(texts[0], Wanted(4))
    assert request.wait().versions == ["new"] * 4
    assert kept.stats().prompt_tokens - before == len(texts[0]), (
        "states of old weights are not used"
    )


def test_a_lockstep_that_fails_loses_no_token(monkeypatch):
    model, ends = old_model(), iter([KeyboardInterrupt, RuntimeError])
    generator = Lockstep(model, max_length=40)
    requests = [r for n in (0, 1) for r in generator.submit(PROMPTS[n], Wanted(NEW))]
    for module, name in ((lockstep, "_decode"), (reading, "_read_chunk")):
        whole, error = getattr(module, name), next(ends)

        def cut_off(*given, module=module, name=name, whole=whole, error=error, **options):
            monkeypatch.setattr(module, name, whole)
            whole(*given, **options)  # the cache is donated and lost
            raise error

        monkeypatch.setattr(module, name, cut_off)
        with pytest.raises(error):
            generator.run()
    generator.run()
    assert [request.tokens for request in requests] == [alone(n, 0, 0)[0] for n in (0, 1)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"logprobs": "all"}, "logprobs='all': must be model or drawn"),
        ({"top_logprobs": 21}, "top_logprobs=21: must be an integer from 0 to 20"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"logit_bias": {1: float("nan")}}, "finite number"),
        ({"logit_bias": {-1: 1.0}}, "token ids"),
        ({"budget": 7}, "must be a Budget"),
        ({"grammar": "a+"}, r"must have mask\(\) and accept\(token\)"),
        ({"stop_strings": ("",)}, "not empty"),
    ],
    ids=str,
)
def test_what_cannot_be_wanted_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Wanted(4, **options)


def test_tokens_of_other_vocabularies_are_refused(generators):
    submit = generators["lockstep", 0].submit
    for wanted in (
        Wanted(4, logit_bias={VOCABULARY: 1.0}),
        Wanted(4, budget=Budget(1, VOCABULARY)),
        Wanted(4, stop_tokens=(VOCABULARY,)),
    ):
        with pytest.raises(ValueError, match=f"outside the model's vocabulary of {VOCABULARY}"):
            submit([1], wanted)
    with pytest.raises(ValueError, match="cannot share a grammar"):
        submit([1], Wanted(4, grammar=Cycle((1,))), n=2)


def test_generate_in_bfloat16_is_the_bfloat16_model():
    """`execution` reaches every product: logits are those of the model in that dtype."""
    execution = nj.Execution(compute_dtype="bfloat16")
    result = nj.generate(old_model(), [PROMPTS[0]], NEW, execution=execution)
    plain = alone(0, 0, 0)[1]
    gap = np.abs(result.logprobs[0, :4] - plain[:4])
    assert 0 < gap.max() < 0.1
