"""Speculation changes the speed alone: greedy tokens stay, samples keep their distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.decoding import lockstep, reading
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.rules import Asked, Free, Rules
from nemotron_jax.decoding.sampling import distribution
from nemotron_jax.decoding.speculative import Acceptance, accept, count_places, place_of
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.parameters import flatten, unflatten
from tests.tiny_models import quick_jit, random_tokens, tiny_model

NEW = 40
LENGTHS = (21, 1, 30, 7, 2, 13, 9, 16)
ROWS = [random_tokens(n, n).tolist() for n in LENGTHS]
MARGIN = 1e-4  # between the two likeliest tokens: nearer ones may change place by rounding


def agreeing(model: nj.Nemotron) -> nj.Nemotron:
    """The model with drafts that are often right: what follows hangs mostly on the last token.

    Mixers add little, and the MTP block passes the embedding on, so that both heads see nearly
    the same state.
    """
    width = model.config.width
    changed = dict(flatten(model))
    for name, leaf in changed.items():
        if name.endswith(("out.weight", "down.weight", "latent_up.weight", "experts.down")):
            changed[name] = 0.2 * leaf
    identity = jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))])
    changed["mtp_block.project.weight"] = identity
    changed["mtp_block.embedding_norm.weight"] = jnp.ones(width)
    changed["mtp_block.final_norm.weight"] = changed["final_norm.weight"]
    return unflatten(model, changed)


@pytest.fixture(scope="module")
def model():
    return for_decoding(agreeing(tiny_model("M*E", mtp="*E")))


@pytest.fixture(scope="module")
def plain(model):
    return nj.generate(model, ROWS, NEW)


@quick_jit
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(model.logits(model(tokens).hidden))


def teacher_forced(model, rows, result):
    """Log-probabilities [B, new, V] where each new token stands, by one pass over whole rows."""
    whole = np.zeros((len(rows), 32 + NEW), np.int32)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
        whole[number, len(row) : len(row) + NEW] = result.tokens[number]
    found = np.asarray(log_probabilities(model, whole))
    return np.stack([found[n, len(row) - 1 :][:NEW] for n, row in enumerate(rows)])


@pytest.mark.parametrize(
    "count, batch, chunk",
    [(1, 8, 7), (2, 3, 1), (3, 8, 64), (4, 1, 1024), (5, 8, 1024), (6, 3, 7), (7, 1, 1)],
)
def test_greedy_tokens_are_those_without_speculation(
    model, plain, monkeypatch, count, batch, chunk
):
    monkeypatch.setattr(reading, "PREFILL_CHUNK", chunk)
    stops = tuple(int(plain.tokens[row, 9 + row]) for row in range(0, batch, 2))
    for options in ({}, {"stop_tokens": stops}):
        result = nj.generate(model, ROWS[:batch], NEW, speculative=count, **options)
        for row in range(batch):
            hits = np.flatnonzero(np.isin(plain.tokens[row], options.get("stop_tokens", ())))
            length = hits[0] + 1 if len(hits) else NEW
            assert result.lengths[row] == length
            np.testing.assert_array_equal(result.tokens[row, :length], plain.tokens[row, :length])
            assert (result.tokens[row, length:] == model.config.pad_token).all()
            np.testing.assert_allclose(
                result.logprobs[row, :length], plain.logprobs[row, :length], atol=1e-4
            )
            assert (result.logprobs[row, length:] == 0).all()
        if batch == len(ROWS):  # neither rejection nor acceptance alone shows much
            assert result.acceptance.mean_length > 1.2
            assert result.acceptance.by_position[0] < 0.9


def test_no_greedy_token_of_these_tests_hangs_on_rounding(model, plain):
    ordered = np.sort(teacher_forced(model, ROWS, plain), axis=-1)
    close = ordered[..., -1] - ordered[..., -2] <= MARGIN
    assert close.mean() < 0.001


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_of_samples_are_the_models(model, count):
    options = {"temperature": 0.8, "top_p": 0.95, "seed": 3}
    result = nj.generate(model, ROWS, NEW, speculative=count, **options)
    expected = teacher_forced(model, ROWS, result)
    chosen = np.take_along_axis(expected, result.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.logprobs, chosen, atol=1e-4)


def test_rows_are_sampled_each_by_its_own_values(model, plain):
    """A greedy row beside sampled ones stays greedy; a row's samples do not hang on the others."""
    options = {"temperature": [0.0, 0.9, 0.7], "top_k": [0, 5, 0], "top_p": [1.0, 1.0, 0.8]}
    for count in (0, 3):
        mixed = nj.generate(model, ROWS[:3], NEW, speculative=count, **options)
        np.testing.assert_array_equal(mixed.tokens[0], plain.tokens[0])
        alone = nj.generate(model, ROWS[:2], NEW, speculative=count, temperature=0.9, top_k=5)
        np.testing.assert_array_equal(mixed.tokens[1], alone.tokens[1])


def rules_of(rows: int, vocabulary: int, **wanted: float) -> Rules:
    """The rules of rows that all want the same; of small tables, since there are many rows."""
    request = Request((0,), Wanted(1, **wanted), 0, lambda: False)
    asked = Asked.of({0: request}, 1, Free(vocabulary))
    tables = {name: getattr(asked, name)[:, :1] for name in ("bias_tokens", "bias_values")}
    asked = dataclasses.replace(asked, **tables)
    asked = jax.tree.map(lambda values: jnp.repeat(jnp.asarray(values), rows, axis=0), asked)
    return Rules.create(asked, pad=0)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 4, "top_p": 0.8}], ids=str
)
def test_what_comes_out_follows_the_models_distribution(options):
    """Tokens after acceptance or rejection, and pairs of them, against the plain distribution."""
    draws, vocabulary = 40_000, 6
    generator = np.random.default_rng(0)
    rules = rules_of(draws, vocabulary, **options)
    sampling = rules.sampling
    # The next token's logits hang on the token before, as a model's do.
    target = jnp.asarray(generator.normal(0, 1.2, (vocabulary, vocabulary)), jnp.float32)
    proposal = target + jnp.asarray(generator.normal(0, 1, target.shape), jnp.float32)
    first = 2

    @quick_jit
    def run(key):
        keys = jax.random.split(key, (3, draws))
        own_keys = dataclasses.replace(rules, row_keys=keys[2])
        draft = []
        token = jnp.full(draws, first)
        for place in range(2):
            logits = distribution(proposal[token], sampling)
            token = jax.vmap(jax.random.categorical)(keys[place], logits)
            draft.append(token)
        fed = jnp.stack([jnp.full(draws, first), *draft], axis=1)
        accepted, own = accept(
            target[fed],
            jnp.stack(draft, axis=1),
            proposal[fed[:, :-1]],
            jnp.zeros(draws, jnp.int32),
            own_keys,
        )
        return (
            accepted,
            jnp.where(accepted > 0, draft[0], own),
            jnp.where(accepted > 1, draft[1], own),
        )

    accepted, one, two = (np.asarray(a) for a in run(jax.random.key(5)))
    sampling = rules_of(vocabulary, vocabulary, **options).sampling
    p = np.exp(np.asarray(distribution(target, sampling), np.float64))
    assert_follows(one, p[first])
    for token in np.flatnonzero(p[first] > 0.05):
        assert_follows(two[(accepted > 0) & (one == token)], p[token])
    q = np.exp(np.asarray(distribution(proposal, sampling), np.float64))
    expected = np.minimum(p[first], q[first]).sum()
    assert abs((accepted > 0).mean() - expected) < 4 * 0.5 / np.sqrt(draws)


def assert_follows(tokens, p):
    """Chi-square within five standard deviations of its mean, and nothing impossible."""
    counts, possible = np.bincount(tokens, minlength=len(p)), p > 1e-9
    assert not counts[~possible].any()
    wanted = len(tokens) * p[possible] / p[possible].sum()
    freedom = possible.sum() - 1
    chi_square = np.sum((counts[possible] - wanted) ** 2 / wanted)
    assert chi_square <= freedom + 5 * np.sqrt(2 * max(freedom, 1))


@pytest.fixture(scope="module")
def forks():
    """A model whose first new tokens are spread out: little of it is certain."""
    changed = dict(flatten(agreeing(tiny_model("M*E", mtp="*E"))))
    changed["head.weight"] = changed["head.weight"] * jnp.where(jnp.arange(53) < 5, 0.35, 0.0)
    return for_decoding(unflatten(tiny_model("M*E", mtp="*E"), changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 6, "top_p": 0.9}],
    ids=str,
)
def test_generated_samples_follow_the_plain_samplers(forks, options):
    """The second to fourth new tokens with and without drafts, of 20,000 draws each."""
    rows = [ROWS[3]] * 2000
    draws = lambda count, seed: nj.generate(forks, rows, 4, speculative=count, seed=seed, **options)
    found = [
        np.concatenate([draws(count, seed).tokens for seed in range(10 * count, 10 * count + 10)])
        for count in (0, 3)
    ]
    for place in range(1, 4):
        counts = np.stack([np.bincount(tokens[:, place], minlength=53) for tokens in found])
        counts = counts[:, counts.sum(axis=0) >= 10]
        expected = counts.sum(axis=0) / 2
        freedom = counts.shape[1] - 1
        assert freedom >= 2
        chi_square = np.sum((counts - expected) ** 2 / expected)
        assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)


def test_rows_that_finish_early_grow_no_more(model, monkeypatch):
    """They are run along until the last one is done, and must not pass their cache's end."""
    ends, decode = [], lockstep._decode

    def kept(*given, **options):
        ends.append(decode(*given, **options))
        return ends[-1]

    monkeypatch.setattr(lockstep, "_decode", kept)
    plain, drafted = (nj.generate(model, ROWS, NEW, speculative=k) for k in (0, 5))
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    # The newest token of a row is not in its cache.
    assert (np.asarray(ends[1][1].length) < np.array(LENGTHS) + NEW).all()


def test_acceptance_counts_what_was_given():
    rounds = ((3, 4), (3, 1), (0, 1), (1, 2), (3, 3))  # drafts that stood, and tokens given
    places = [place_of(np.arange(4), np.array(stood))[:given] for stood, given in rounds]
    found = Acceptance.of_places(count_places(np.concatenate([[-1], *places]), 3))
    assert (found.drafted, found.accepted, found.mean_length) == (15, 3 + 1 + 0 + 1 + 3, 11 / 5)
    assert found.by_position == (0.8, 0.4, 0.4)


@pytest.mark.parametrize("limit", [1, 2, 3, 24])
def test_rounds_give_the_tokens_that_acceptance_says(limit):
    """Every draft stands, and the limit cuts the last round's: nobody was given what it cuts."""
    model = jax.tree.map(jnp.zeros_like, tiny_model("M*E", mtp="*E"))  # all say token 0
    found = nj.generate(model, ROWS[:1], limit, speculative=5).acceptance
    rounds = -(-(limit - 1) // 6)  # the first token is the prompt's own
    assert found.drafted == 5 * rounds
    assert found.mean_length == ((limit - 1) / rounds if rounds else 1)
    assert found.accepted == limit - 1 - (limit - 1) // 6


@pytest.mark.parametrize(
    "mtp, count, message",
    [
        ("*E", -1, "speculative=-1: must be an integer from 0 to 32"),
        ("*E", 33, "speculative=33: must be an integer from 0 to 32"),
        (None, 2, "speculative=2 needs an MTP block"),
    ],
)
def test_impossible_speculation_is_an_error(mtp, count, message):
    with pytest.raises(ValueError, match=message):
        nj.generate(tiny_model("M*E", mtp=mtp), [[1]], 2, speculative=count)


def test_values_for_another_number_of_rows_are_an_error(model):
    with pytest.raises(ValueError, match="temperature has 2 values for 3 prompts"):
        nj.generate(model, ROWS[:3], 2, temperature=[0.0, 1.0])
