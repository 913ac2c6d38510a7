"""The loop of rounds that every way of generating compiles: decode, keep what counts, stop rows."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.decoding.rounding import keep_states
from nemotron_jax.decoding.sampling import Sampling, sample
from nemotron_jax.decoding.speculative import DRAW, finish_round, keys_at, place_of, run_round
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What the decode loop carries. Each row's newest token is in `tokens`, not in the cache."""

    cache: Cache
    token: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    places: Int[Array, "B N"]  # of each token in its round; -1 for one that no round gave

    @classmethod
    def create(
        cls,
        cache: Cache,
        token: Int[Array, "B"],
        done: Bool[Array, "B"],
        *,
        capacity: int,
        speculative: int,
        pad: int,
    ) -> "Loop":
        """A loop that has given nothing yet, with room for `capacity` tokens a row."""
        # Room for a last round's tokens past the limit, which are not kept.
        shape = (len(token), capacity + speculative + 1)
        return cls(
            cache=cache,
            token=token,
            tokens=jnp.full(shape, pad, jnp.int32),
            logprobs=jnp.zeros(shape, jnp.float32),
            lengths=jnp.zeros(len(token), jnp.int32),
            done=done,
            places=jnp.full(shape, -1, jnp.int8),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How rows are sampled and when they stop; a row's stop tokens are its own or everyone's."""

    sampling: Sampling
    row_keys: Array
    stops: Int[Array, "*B S"]  # -1, which no token equals, fills a table up
    limit: Int[Array, "*B"]  # tokens that a row may give
    pad: int = dataclasses.field(metadata={"static": True})
    # How SSM states are rounded that the cache keeps in fewer bits than they are computed in.
    rounding: str = dataclasses.field(default="stochastic", metadata={"static": True})


def first_tokens(
    loop: Loop, logits: Float[Array, "B V"], rows: Bool[Array, "B"], rules: Rules
) -> Loop:
    """The loop after the given rows' first token, which is drawn from the prompt's own logits."""
    token = sample(logits, keys_at(rules.row_keys, loop.cache.length, DRAW), rules.sampling)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    logprob = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    none = jnp.full_like(token[:, None], -1)
    loop = emit(loop, token[:, None], logprob, none, rows.astype(jnp.int32), rules)
    return dataclasses.replace(loop, token=jnp.where(rows, token, loop.token))


def run_rounds(
    model: Nemotron,
    loop: Loop,
    rules: Rules,
    *,
    speculative: int,
    most_rounds: Int[Array, ""] | None = None,
    resting: bool = False,
) -> Loop:
    """The loop after rounds until every row is done, or after `most_rounds` of them.

    With `resting` the states of a row that is done stay as they were when it was; without, they
    mean nothing.
    """

    def run(carried: tuple[Loop, Array]) -> tuple[Loop, Array]:
        loop, rounds = carried
        round = run_round(
            model,
            loop.cache,
            loop.token,
            speculative,
            sampling=rules.sampling,
            row_keys=rules.row_keys,
        )
        places = place_of(jnp.arange(speculative + 1), round.accepted[:, None])
        active = ~loop.done
        after = dataclasses.replace(
            emit(loop, round.tokens, round.logprobs, places, round.accepted + 1, rules),
            token=jnp.take_along_axis(round.tokens, round.accepted[:, None], axis=1)[:, 0],
        )
        # A row that this round has finished grows no more: the others may go on for long.
        cache = finish_round(model, round, ~after.done)
        cache = keep_states(cache, loop.cache, rules.rounding)
        if resting:
            # Without drafts the round has fed the newest token, so the states are those after it.
            moved = ~after.done if speculative else active
            cache = cache.where(moved, loop.cache)
            after = dataclasses.replace(after, token=jnp.where(active, after.token, loop.token))
        return dataclasses.replace(after, cache=cache), rounds + 1

    def goes_on(carried: tuple[Loop, Array]) -> Bool[Array, ""]:
        loop, rounds = carried
        left = True if most_rounds is None else rounds < most_rounds
        return ~jnp.all(loop.done) & left

    return jax.lax.while_loop(goes_on, run, (loop, jnp.int32(0)))[0]


def emit(
    loop: Loop,
    tokens: Int[Array, "B n"],
    logprobs: Float[Array, "B n"],
    places: Int[Array, "B n"],
    count: Int[Array, "B"],
    rules: Rules,
) -> Loop:
    """Rows with the first `count` tokens added, up to a stop token and to the limit."""
    stop = jnp.any(tokens[..., None] == jnp.expand_dims(rules.stops, -2), axis=-1)
    # The place of a row's first stop token, or one that no count reaches.
    first = jnp.where(jnp.any(stop, axis=1), jnp.argmax(stop, axis=1), tokens.shape[1])
    room = jnp.where(loop.done, 0, rules.limit - loop.lengths)
    kept = jnp.minimum(jnp.minimum(count, first + 1), room)
    inside = jnp.arange(tokens.shape[1]) < kept[:, None]
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    lengths = loop.lengths + kept
    return dataclasses.replace(
        loop,
        tokens=write(loop.tokens, jnp.where(inside, tokens, rules.pad), loop.lengths),
        logprobs=write(loop.logprobs, jnp.where(inside, logprobs, 0.0), loop.lengths),
        places=write(loop.places, jnp.where(inside, places, -1).astype(jnp.int8), loop.lengths),
        lengths=lengths,
        done=loop.done | (lengths >= rules.limit) | (first < kept),
    )
