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
from jaxtyping import Array, Float, Int

from nemotron_jax.decoding.sampling import Sampling, distribution, draw, sample
from nemotron_jax.decoding.step import commit, decode_step, verify_step
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
    def of_places(cls, counts: Int[np.ndarray, "places"]) -> "Acceptance":
        """From how many tokens were given at each place, as `place_of` numbers them."""
        drafts = counts[1:-2:2]
        verifications = int(counts[0] + counts[1])
        times = max(verifications, 1)
        return cls(
            drafted=verifications * len(drafts),
            accepted=int(drafts.sum()),
            by_position=tuple(float(count) / times for count in drafts),
            mean_length=float(counts.sum()) / times if verifications else 1.0,
        )


def place_of(number: Int[Array, "k+1"], accepted: Int[Array, "B 1"]) -> Int[Array, "B k+1"]:
    """What the tokens of a round are, by their number in it: twice that, and one more for a
    draft."""
    return 2 * number + (number < accepted)


def count_places(places: Int[np.ndarray, "*N"], speculative: int) -> Int[np.ndarray, "places"]:
    """How many tokens there are of each place; -1 is of no round and not counted."""
    return np.bincount(places[places >= 0], minlength=2 * (speculative + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
    """What one round gave: the first `accepted` + 1 tokens of each row count."""

    cache: Cache  # with the state after each of the tokens that were fed; at rest without drafts
    fed: Int[Array, "B k+1"]  # the newest token and the drafts
    hidden: Float[Array, "B k+1 D"] | None  # None without drafts
    tokens: Int[Array, "B k+1"]  # those that follow: accepted drafts, then the model's own
    logprobs: Float[Array, "B k+1"]  # float32 log-softmax of the untempered logits
    accepted: Int[Array, "B"]


def keys_at(row_keys: Array, position: Int[Array, "B"], use: int) -> Array:
    """A key for each row, of a position in its text and of a use."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(row_keys, position), jnp.full_like(position, use))


def draft(
    model: Nemotron,
    cache: Cache,
    token: Int[Array, "B"],
    count: int,
    *,
    sampling: Sampling,
    row_keys: Array,
) -> tuple[Cache, Int[Array, "B k"], Float[Array, "B k V"]]:
    """`count` tokens after `token`, which the cache does not hold yet, and the logits they are of.

    The first MTP step embeds `token` beside the backbone's state of the token before; each later
    one embeds the fresh draft beside the previous step's state. The cache comes back with their
    entries, which `commit` discards. Source: vLLM's proposer for this family (nemotron_h_mtp).
    """

    def step(carry: tuple, number: Array) -> tuple[tuple, tuple]:
        mtp, hidden, token = carry
        output = model.mtp_step(hidden[:, None], token[:, None], cache=mtp)
        hidden = output.hidden[:, 0]
        logits = model.logits(hidden)
        if sampling.greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            keys = keys_at(row_keys, cache.length + 1 + number, DRAFT)
            token = draw(distribution(logits, sampling), keys)
        return (output.cache, hidden, token), (token, logits)

    start = (cache.mtp, cache.hidden, token)
    (mtp, _, _), (tokens, logits) = jax.lax.scan(step, start, jnp.arange(count))
    cache = dataclasses.replace(cache, mtp=mtp)
    return cache, jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(logits, 0, 1)


def accept(
    logits: Float[Array, "B k+1 V"],
    drafts: Int[Array, "B k"],
    draft_logits: Float[Array, "B k V"],
    position: Int[Array, "B"],
    *,
    sampling: Sampling,
    row_keys: Array,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """How many drafts of each row stand, and the token that follows them.

    `position` is that of the first draft in its text. A draft of probability q that the model gives
    p stands with probability min(1, p / q); after the first that falls the next token is drawn from
    what p has over q, and after all of them from p. Both are after temperature and filters.
    """
    count = drafts.shape[1]
    if sampling.greedy:
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        accepted = _leading(likeliest[:, :count] == drafts)
        return accepted, jnp.take_along_axis(likeliest, accepted[:, None], axis=1)[:, 0]
    p = distribution(logits, sampling)
    q = distribution(draft_logits, sampling)
    place = position[:, None] + jnp.arange(count)
    ratio = _of_tokens(p[:, :count], drafts) - _of_tokens(q, drafts)
    uniform = jax.vmap(lambda at: jax.vmap(jax.random.uniform)(keys_at(row_keys, at, ACCEPT)))
    accepted = _leading(jnp.log(jnp.moveaxis(uniform(place.T), 0, 1)) < ratio)
    # Past the last draft nothing was drafted, so that what p has over q is all of p.
    q = jnp.concatenate([q, jnp.full_like(q[:, :1], -jnp.inf)], axis=1)
    at = lambda values: jnp.take_along_axis(values, accepted[:, None, None], axis=1)[:, 0]
    p, q = at(p), at(q)
    over = jnp.log(jnp.maximum(jnp.exp(p) - jnp.exp(q), 0))
    # Where rounding leaves nothing over, p and q are the same, and nothing was rejected but by it.
    over = jnp.where(jnp.any(over > -jnp.inf, axis=-1, keepdims=True), over, p)
    return accepted, draw(over, keys_at(row_keys, position + accepted, DRAW))


def run_round(
    model: Nemotron,
    cache: Cache,
    token: Int[Array, "B"],
    count: int,
    *,
    sampling: Sampling,
    row_keys: Array,
) -> Round:
    """Draft, verify, accept; `finish_round` brings the cache to rest. A count of 0 drafts none."""
    position = cache.length + 1  # `token` stands before it
    options = {"sampling": sampling, "row_keys": row_keys}
    if count == 0:
        cache, logits = decode_step(model, cache, token)
        tokens = sample(logits, keys_at(row_keys, position, DRAW), sampling)[:, None]
        logprobs = _logprobs(logits[:, None], tokens)
        return Round(cache, token[:, None], None, tokens, logprobs, jnp.zeros_like(token))
    cache, drafts, draft_logits = draft(model, cache, token, count, **options)
    fed = jnp.concatenate([token[:, None], drafts], axis=1)
    cache, hidden, logits = verify_step(model, cache, fed)
    accepted, own = accept(logits, drafts, draft_logits, position, **options)
    tokens = jnp.concatenate([drafts, own[:, None]], axis=1)
    tokens = jnp.where(jnp.arange(count + 1) < accepted[:, None], tokens, own[:, None])
    return Round(cache, fed, hidden, tokens, _logprobs(logits, tokens), accepted)


def finish_round(model: Nemotron, round: Round, active: Array) -> Cache:
    """The cache at rest: it holds all of a row's tokens but the newest.

    After drafts, rows that are not active keep their length; a single token is added to all.
    """
    if round.hidden is None:
        return round.cache
    count = jnp.where(active, round.accepted + 1, 0)
    return commit(model, round.cache, round.hidden, round.fed, count)


def _leading(stands: Array) -> Int[Array, "B"]:
    """How many stand before the first that does not."""
    return jnp.sum(jnp.cumprod(stands.astype(jnp.int32), axis=1), axis=1)


def _logprobs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    return _of_tokens(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def _of_tokens(values: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
