"""The loop of rounds that every way of generating compiles: decode, keep what counts, stop rows."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding.rounding import keep_states
from nemotron_jax.decoding.rules import NO_BUDGET, Rules, forced, shaped
from nemotron_jax.decoding.sampling import sample
from nemotron_jax.decoding.speculative import (
    DRAW,
    Given,
    Standing,
    finish_round,
    keys_at,
    run_round,
    told,
)
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a loop is compiled for."""

    capacity: int  # tokens that one call may give a row
    speculative: int  # drafts a round
    top: int = 0  # likeliest tokens that are told of each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fed:
    """What a loop without drafts has fed the model, round by round, for an MTP block that is fed
    later; rows that are done stand still, so what is theirs stands first."""

    hidden: Float[Array, "B R D"]
    tokens: Int[Array, "B R"]

    @classmethod
    def blank(cls, hidden: Float[Array, "B D"], rounds: int) -> "Fed":
        """Room for so many rounds, of rows with such hidden states."""
        tokens = jnp.zeros((len(hidden), rounds), jnp.int32)
        return cls(jnp.zeros((*tokens.shape, hidden.shape[1]), hidden.dtype), tokens)

    def after(self, number: Int[Array, ""], hidden: Array, tokens: Array) -> "Fed":
        """With those of a round, [B 1 D] and [B 1]."""
        put = lambda all_of, new: jax.lax.dynamic_update_slice_in_dim(
            all_of, new.astype(all_of.dtype), number, axis=1
        )
        return Fed(put(self.hidden, hidden), put(self.tokens, tokens))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What the decode loop carries. Each row's newest token is in `given`, not in the cache."""

    cache: Cache
    token: Int[Array, "B"]
    given: Given  # [B, N]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    thinking: Bool[Array, "B"]  # its reasoning is open and has a budget
    fed: Fed | None = None  # kept where the MTP block is to be fed later

    @classmethod
    def create(
        cls,
        cache: Cache,
        token: Int[Array, "B"],
        done: Bool[Array, "B"],
        rules: Rules,
        sizes: Sizes,
    ) -> "Loop":
        """A loop that has given nothing yet."""
        # Room for a last round's tokens past the limit, which are not kept.
        room = sizes.capacity + sizes.speculative + 1
        return cls(
            cache=cache,
            token=token,
            given=Given.blank(len(token), room, top=sizes.top, pad=rules.pad),
            lengths=jnp.zeros(len(token), jnp.int32),
            done=done,
            thinking=rules.asked.budget != NO_BUDGET,
        )


def begin(
    model: Nemotron,
    loop: Loop,
    hidden: Float[Array, "B D"],
    fresh: Bool[Array, "B"],
    rules: Rules,
    *,
    execution: Execution = Execution(),
) -> Loop:
    """The loop after the first token of the rows whose prompts have just been read."""

    def drawn(loop: Loop) -> Loop:
        return first_tokens(loop, model.logits(hidden, execution=execution), fresh, rules)

    return jax.lax.cond(jnp.any(fresh), drawn, lambda loop: loop, loop)


def first_tokens(
    loop: Loop, logits: Float[Array, "B V"], rows: Bool[Array, "B"], rules: Rules
) -> Loop:
    """The loop after the given rows' first token, which is drawn from the prompt's own logits."""
    given, plain = rules.asked.given + loop.lengths, logits[:, None]
    likely = shaped(plain, rules, given[:, None])
    keys = keys_at(rules.row_keys, loop.cache.length, DRAW)
    token = sample(likely[:, 0], keys, rules.sampling)[:, None]
    token, _, put = forced(token, jnp.zeros_like(given), rules, given, loop.thinking)
    top = loop.given.top_tokens.shape[-1]
    found = told(token, put, (plain, likely), rules, top)
    loop = emit(loop, found, rows.astype(jnp.int32), rules)
    return dataclasses.replace(loop, token=jnp.where(rows, token[:, 0], loop.token))


def run_rounds(
    model: Nemotron,
    loop: Loop,
    rules: Rules,
    sizes: Sizes,
    *,
    most_rounds: Int[Array, ""],
    execution: Execution = Execution(),
) -> Loop:
    """The loop after rounds until every row is done, or after `most_rounds` of them.

    The states of a row that is done stay as they were when it was.
    """

    def run(carried: tuple[Loop, Array]) -> tuple[Loop, Array]:
        loop, rounds = carried
        at = Standing(loop.cache, loop.token, rules.asked.given + loop.lengths, loop.thinking)
        round = run_round(model, at, sizes.speculative, rules, top=sizes.top, execution=execution)
        active = ~loop.done
        after = emit(loop, round.given, round.accepted + 1, rules)
        newest = jnp.take_along_axis(round.given.tokens, round.accepted[:, None], axis=1)[:, 0]
        # A row that this round has finished grows no more: the others may go on for long.
        cache = finish_round(model, round, ~after.done, execution=execution)
        cache = keep_states(cache, loop.cache, rules.rounding)
        if not sizes.speculative:
            # The round has fed the newest token of all rows. Where drafts were verified, a row that
            # grows no more has been left as it was.
            cache = cache.where(active, loop.cache)
        token = jnp.where(active, newest, loop.token)
        fed = None if loop.fed is None else loop.fed.after(rounds, round.hidden, round.fed)
        return dataclasses.replace(after, cache=cache, token=token, fed=fed), rounds + 1

    def goes_on(carried: tuple[Loop, Array]) -> Bool[Array, ""]:
        loop, rounds = carried
        return ~jnp.all(loop.done) & (rounds < most_rounds)

    return jax.lax.while_loop(goes_on, run, (loop, jnp.int32(0)))[0]


def emit(loop: Loop, new: Given, count: Int[Array, "B"], rules: Rules) -> Loop:
    """Rows with the first `count` of the new tokens added, up to a stop token and to the limit."""
    tokens, width = new.tokens, new.tokens.shape[1]
    stop = jnp.any(tokens[..., None] == jnp.expand_dims(rules.asked.stops, -2), axis=-1)
    # The place of a row's first stop token, or one that no count reaches.
    first = jnp.where(jnp.any(stop, axis=1), jnp.argmax(stop, axis=1), width)
    room = jnp.where(loop.done, 0, rules.asked.limit - loop.lengths)
    kept = jnp.minimum(jnp.minimum(count, first + 1), room)
    inside = jnp.arange(width) < kept[:, None]
    top = new.top_tokens.shape[-1]
    blank = Given.blank(*tokens.shape, top=top, pad=rules.pad)

    def written(all_of: Array, some: Array, nothing: Array) -> Array:
        mask = inside.reshape(*inside.shape, *(1,) * (some.ndim - 2))
        at = lambda row, new, place: jax.lax.dynamic_update_slice(
            row, new, (place, *(0,) * (row.ndim - 1))
        )
        return jax.vmap(at)(all_of, jnp.where(mask, some, nothing), loop.lengths)

    lengths = loop.lengths + kept
    closed = jnp.any((tokens == rules.asked.closing[:, None]) & inside, axis=1)
    return dataclasses.replace(
        loop,
        given=jax.tree.map(written, loop.given, new, blank),
        lengths=lengths,
        done=loop.done | (lengths >= rules.asked.limit) | (first < kept),
        thinking=loop.thinking & ~closed,
    )
