"""Speculation with the model's own drafts: the MTP block proposes, one pass of the model verifies.

A round takes each row's newest token, drafts k more with the MTP block, runs the model once over
all k + 1, and keeps the drafts up to the first that is rejected, with one token of the model's own
after them. What comes out is distributed as plain sampling is (greedy: the same tokens), whatever
the drafts are worth. Source: speculative sampling, arXiv:2211.17192 and arXiv:2302.01318.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding.rules import Rules, forced, shaped
from nemotron_jax.decoding.sampling import distribution, draw, sample
from nemotron_jax.decoding.step import commit, feed_token, verify_step
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron

# What a random number is for, at one position of one row. The uses never share one, or a draft
# would know whether it will be accepted.
DRAW, DRAFT, ACCEPT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How drafts fared. A draft counts as accepted where someone was given it: neither one of a row
    that was finished does, nor one past a stop or a limit."""

    drafted: int
    accepted: int
    by_position: tuple[float, ...]  # share of all drafts at each place that were accepted
    mean_length: float  # tokens that one verification gave, the model's own counted

    @classmethod
    def of_places(cls, counts: Int[np.ndarray, "k+1 places"]) -> "Acceptance":
        """From how many tokens were given at each place, as `place_of` numbers them, in rounds of
        0 to k drafts."""
        counts = counts[1:]  # those of rounds with drafts
        drafts, verifications = counts[:, 1:-2:2].sum(axis=0), counts[:, 0] + counts[:, 1]
        times = np.cumsum(verifications[::-1])[::-1]  # of rounds with a draft at each place
        verified = int(times[0]) if len(times) else 0
        return cls(
            drafted=int(times.sum()),
            accepted=int(drafts.sum()),
            by_position=tuple((drafts / np.maximum(times, 1)).tolist()),
            mean_length=float(counts.sum()) / verified if verified else 1.0,
        )


def place_of(number: Int[Array, "k+1"], accepted: Int[Array, "B 1"]) -> Int[Array, "B k+1"]:
    """What the tokens of a round are, by their number in it: twice that, and one more for a
    draft."""
    return 2 * number + (number < accepted)


def count_places(
    places: Int[np.ndarray, "*N"], drafts: int, most: int | None = None
) -> Int[np.ndarray, "k+1 places"]:
    """How many tokens there are of each place, of rounds of so many drafts, in a table of `most`
    drafts (None: of no more than these); -1 is of no round and not counted."""
    most = drafts if most is None else most
    counts = np.zeros((most + 1, 2 * (most + 1)), np.int64)
    counts[drafts] = np.bincount(places[places >= 0], minlength=counts.shape[1])
    return counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Tokens of rows with what is said of each; arrays of one shape, [B, n] or [B, n, top]."""

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]  # float32, as the row asked
    places: Int[Array, "B n"]  # in its round, as `place_of` says; -1 for one that no round gave
    forced: Bool[Array, "B n"]
    top_tokens: Int[Array, "B n top"]
    top_logprobs: Float[Array, "B n top"]  # of the model

    @classmethod
    def blank(cls, rows: int, tokens: int, *, top: int, pad: int) -> "Given":
        """What stands where nothing was given."""
        fill = lambda value, dtype, *last: jnp.full((rows, tokens, *last), value, dtype)
        return cls(
            tokens=fill(pad, jnp.int32),
            logprobs=fill(0, jnp.float32),
            places=fill(-1, jnp.int8),
            forced=fill(False, bool),
            top_tokens=fill(pad, jnp.int32, top),
            top_logprobs=fill(0, jnp.float32, top),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
    """What one round gave: the first `accepted` + 1 tokens of each row count."""

    cache: Cache  # of which any number of the fed tokens can be kept; at rest without drafts
    fed: Int[Array, "B k+1"]  # the newest token and the drafts
    hidden: Float[Array, "B k+1 D"]
    given: Given  # those that follow: accepted drafts, then the model's own
    accepted: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standing:
    """Where rows stand before a round."""

    cache: Cache
    token: Int[Array, "B"]  # the newest, which the cache does not hold
    given: Int[Array, "B"]  # tokens of the continuation so far
    thinking: Bool[Array, "B"]  # whose reasoning is open and has a budget


def keys_at(row_keys: Array, position: Int[Array, "B"], use: int) -> Array:
    """A key for each row, of a position in its text and of a use."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(row_keys, position), jnp.full_like(position, use))


def draft(
    model: Nemotron,
    at: Standing,
    count: int,
    rules: Rules,
    *,
    execution: Execution = Execution(),
) -> tuple[Cache, Int[Array, "B k"], Float[Array, "B k V"]]:
    """`count` tokens after the newest one, and the logits they are of, shaped by the rules.

    The first MTP step embeds the newest token beside the backbone's state of the token before; each
    later one embeds the fresh draft beside the previous step's state. The cache comes back with
    their entries, which `commit` discards. Source: vLLM's proposer for this family
    (nemotron_h_mtp).
    """
    cache = at.cache

    def step(carry: tuple, number: Array) -> tuple[tuple, tuple]:
        mtp, hidden, token = carry
        output = model.mtp_step(hidden[:, None], token[:, None], cache=mtp, execution=execution)
        hidden = output.hidden[:, 0]
        logits = model.logits(output.hidden, execution=execution)
        logits = shaped(logits, rules, (at.given + number)[:, None])[:, 0]
        keys = keys_at(rules.row_keys, cache.length + 1 + number, DRAFT)
        token = sample(logits, keys, rules.sampling)
        return (output.cache, hidden, token), (token, logits)

    start = (cache.mtp, cache.hidden, at.token)
    (mtp, _, _), (tokens, logits) = jax.lax.scan(step, start, jnp.arange(count))
    cache = dataclasses.replace(cache, mtp=mtp)
    return cache, jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(logits, 0, 1)


def accept(
    logits: Float[Array, "B k+1 V"],
    drafts: Int[Array, "B k"],
    draft_logits: Float[Array, "B k V"],
    position: Int[Array, "B"],
    rules: Rules,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """How many drafts of each row stand, and the token that follows them.

    `position` is that of the first draft in its text. A draft of probability q that the model gives
    p stands with probability min(1, p / q); after the first that falls the next token is drawn from
    what p has over q, and after all of them from p. Both are after temperature and filters. A row
    with a grammar takes no draft: the mask is known of its next token alone.
    """
    grammar = rules.asked.grammar

    def likeliest(logits: Array) -> tuple[Array, Array]:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        stands = (best[:, : drafts.shape[1]] == drafts) & ~grammar[:, None]
        accepted = _leading(stands)
        return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]

    return jax.lax.cond(
        jnp.all(rules.sampling.greedy),
        likeliest,
        lambda logits: _drawn(logits, drafts, draft_logits, position, rules),
        logits,
    )


def _drawn(
    logits: Float[Array, "B k+1 V"],
    drafts: Int[Array, "B k"],
    draft_logits: Float[Array, "B k V"],
    position: Int[Array, "B"],
    rules: Rules,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """`accept` of rows that are sampled."""
    count, row_keys, grammar = drafts.shape[1], rules.row_keys, rules.asked.grammar
    p = distribution(logits, rules.sampling)
    q = distribution(draft_logits, rules.sampling)
    place = position[:, None] + jnp.arange(count)
    ratio = _of_tokens(p[:, :count], drafts) - _of_tokens(q, drafts)
    uniform = jax.vmap(lambda at: jax.vmap(jax.random.uniform)(keys_at(row_keys, at, ACCEPT)))
    stands = jnp.log(jnp.moveaxis(uniform(place.T), 0, 1)) < ratio
    accepted = _leading(stands & ~grammar[:, None])
    # Past the last draft nothing was drafted, so that what p has over q is all of p.
    q = jnp.where(grammar[:, None, None], -jnp.inf, q)
    q = jnp.concatenate([q, jnp.full_like(q[:, :1], -jnp.inf)], axis=1)
    at = lambda values: jnp.take_along_axis(values, accepted[:, None, None], axis=1)[:, 0]
    p, q = at(p), at(q)
    over = jnp.log(jnp.maximum(jnp.exp(p) - jnp.exp(q), 0))
    # Where rounding leaves nothing over, p and q are the same, and nothing was rejected but by it.
    over = jnp.where(jnp.any(over > -jnp.inf, axis=-1, keepdims=True), over, p)
    return accepted, draw(over, keys_at(row_keys, position + accepted, DRAW))


def run_round(
    model: Nemotron,
    at: Standing,
    count: int,
    rules: Rules,
    *,
    top: int = 0,
    execution: Execution = Execution(),
) -> Round:
    """Draft, verify, accept; `finish_round` brings the cache to rest. A count of 0 drafts none."""
    position = at.cache.length + 1  # the newest token stands before it
    number = at.given[:, None] + jnp.arange(count + 1)
    if count == 0:
        cache, hidden = feed_token(model, at.cache, at.token, execution=execution)
        fed, logits = at.token[:, None], model.logits(hidden, execution=execution)
        likely = shaped(logits, rules, number)
        keys = keys_at(rules.row_keys, position, DRAW)
        tokens = sample(likely[:, 0], keys, rules.sampling)[:, None]
        accepted = jnp.zeros_like(at.token)
    else:
        cache, drafts, draft_logits = draft(model, at, count, rules, execution=execution)
        fed = jnp.concatenate([at.token[:, None], drafts], axis=1)
        cache, hidden, logits = verify_step(model, cache, fed, execution=execution)
        likely = shaped(logits, rules, number)
        accepted, own = accept(likely, drafts, draft_logits, position, rules)
        tokens = jnp.concatenate([drafts, own[:, None]], axis=1)
        tokens = jnp.where(jnp.arange(count + 1) < accepted[:, None], tokens, own[:, None])
    tokens, accepted, put = forced(tokens, accepted, rules, at.given, at.thinking)
    places = place_of(jnp.arange(count + 1), accepted[:, None])
    given = told(tokens, put, (logits, likely), rules, top)
    given = dataclasses.replace(given, places=places.astype(jnp.int8))
    return Round(cache, fed, hidden, given, accepted)


def told(
    tokens: Int[Array, "B n"],
    put: Bool[Array, "B n"],
    logits: tuple[Float[Array, "B n V"], Float[Array, "B n V"]],
    rules: Rules,
    top: int,
) -> Given:
    """What is said of tokens, given the model's logits and those after the rules; of no round.

    `put` are those that no chance had a part in: their log-probability is the model's.
    """
    plain, likely = logits
    own = jax.nn.logsumexp(plain, axis=-1)
    logprobs = _of_tokens(plain, tokens) - own
    drawn = rules.asked.drawn[:, None] & ~put
    logprobs = jax.lax.cond(
        jnp.any(drawn),
        lambda model: jnp.where(
            drawn, _of_tokens(distribution(likely, rules.sampling), tokens), model
        ),
        lambda model: model,
        logprobs,
    )
    blank = Given.blank(*tokens.shape, top=top, pad=rules.pad)
    best = blank.top_logprobs, blank.top_tokens
    if top:
        best = jax.lax.cond(
            jnp.any(rules.asked.top > 0),
            lambda: tuple(jax.lax.top_k(plain - own[..., None], top)),
            lambda: best,
        )
    return dataclasses.replace(
        blank,
        tokens=tokens,
        logprobs=logprobs,
        forced=put,
        top_tokens=best[1],
        top_logprobs=best[0],
    )


def finish_round(
    model: Nemotron, round: Round, active: Array, *, execution: Execution = Execution()
) -> Cache:
    """The cache at rest: it holds all of a row's tokens but the newest.

    After drafts, rows that are not active keep their length; a single token is added to all.
    """
    if round.fed.shape[1] == 1:
        return round.cache
    count = jnp.where(active, round.accepted + 1, 0)
    return commit(model, round.cache, round.hidden, round.fed, count, execution=execution)


def _leading(stands: Array) -> Int[Array, "B"]:
    """How many stand before the first that does not."""
    return jnp.sum(jnp.cumprod(stands.astype(jnp.int32), axis=1), axis=1)


def _of_tokens(values: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
