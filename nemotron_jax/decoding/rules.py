"""What each row of a decode call is asked for, and what that makes of the model's logits."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.sampling import Sampling
from nemotron_jax.decoding.wanted import MOST_BIASES, MOST_STOP_TOKENS

_BITS = 32  # tokens in one word of a grammar's mask
NO_BUDGET = -1  # 0 is a budget: one that is used up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """What a decode call is told of every row's request; arrays of numpy, so that telling is one
    transfer. `bias_…` and `allowed` lie on the device while no row uses them."""

    limit: Int[np.ndarray, "B"]  # tokens that a row may still give
    given: Int[np.ndarray, "B"]  # tokens that it has given before this call
    stops: Int[np.ndarray, "B S"]  # -1, which no token equals, fills a table up
    seed: Int[np.ndarray, "B"]
    branch: Int[np.ndarray, "B"]
    temperature: Float[np.ndarray, "B"]
    top_k: Int[np.ndarray, "B"]
    top_p: Float[np.ndarray, "B"]
    min_p: Float[np.ndarray, "B"]
    min_tokens: Int[np.ndarray, "B"]  # before so many no stop token is given
    drawn: Bool[np.ndarray, "B"]  # log-probabilities are those of what is drawn from
    top: Int[np.ndarray, "B"]  # of how many likeliest tokens log-probabilities are wanted
    budget: Int[np.ndarray, "B"]  # of reasoning; NO_BUDGET where it is over, or has no bound
    closing: Int[np.ndarray, "B"]  # the token that ends the reasoning; -1 without a budget
    grammar: Bool[np.ndarray, "B"]  # whether `allowed` says what may come next
    bias_tokens: Int[Array, "B N"]  # one past the vocabulary fills a table up
    bias_values: Float[Array, "B N"]
    allowed: UInt32[Array, "B W"]  # bit t of word w: token 32 w + t may come next

    @classmethod
    def of(cls, requests: dict[int, Request], count: int, free: "Free") -> "Asked":
        """Of `count` rows, those of the requests by row; the others ask for nothing."""
        integers = lambda fill=0: np.full(count, fill, np.int32)
        floats = lambda fill=0.0: np.full(count, fill, np.float32)
        flags = lambda: np.zeros(count, bool)
        asked = cls(
            limit=integers(1),
            given=integers(),
            stops=np.full((count, MOST_STOP_TOKENS), -1, np.int32),
            seed=np.zeros(count, np.uint32),
            branch=integers(),
            temperature=floats(),
            top_k=integers(),
            top_p=floats(1.0),
            min_p=floats(),
            min_tokens=integers(),
            drawn=flags(),
            top=integers(),
            budget=integers(NO_BUDGET),
            closing=integers(-1),
            grammar=flags(),
            **free.tables(requests, count),
        )
        for row, request in requests.items():
            asked._put(row, request)
        return asked

    def _put(self, row: int, request: Request) -> None:
        wanted = request.wanted
        self.given[row] = len(request.tokens)
        self.limit[row] = wanted.max_new_tokens - len(request.tokens)
        self.stops[row, : len(wanted.stop_tokens)] = wanted.stop_tokens
        self.seed[row], self.branch[row] = wanted.seed, request.branch
        self.temperature[row], self.top_k[row] = wanted.temperature, wanted.top_k
        self.top_p[row], self.min_p[row] = wanted.top_p, wanted.min_p
        self.min_tokens[row], self.top[row] = wanted.min_tokens, wanted.top_logprobs
        self.drawn[row], self.grammar[row] = wanted.logprobs == "drawn", wanted.grammar is not None
        if (budget := wanted.budget) is not None and budget.closing_token not in request.tokens:
            self.budget[row], self.closing[row] = budget.tokens, budget.closing_token


def rounds_under(requests: Sequence[Request], most: int) -> int:
    """How many rounds may follow before a grammar must be asked again: one, and none after a first
    token."""
    ruled = [request for request in requests if request.wanted.grammar is not None]
    return min([most, *(min(len(request.tokens), 1) for request in ruled)])


class Free:
    """The tables of rows that favour no token and forbid none, kept on the device by row count."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._kept: dict[int, dict[str, Array]] = {}

    def tables(self, requests: dict[int, Request], count: int) -> dict[str, Array]:
        """`bias_tokens`, `bias_values` and `allowed` of some requests by row."""
        if count not in self._kept:
            self._kept[count] = jax.tree.map(jnp.asarray, self._blank(count))
        tables = dict(self._kept[count])
        biased = {row: r.wanted.logit_bias for row, r in requests.items() if r.wanted.logit_bias}
        if biased:
            blank = self._blank(count)
            for row, bias in biased.items():
                blank["bias_tokens"][row, : len(bias)] = list(bias)
                blank["bias_values"][row, : len(bias)] = list(bias.values())
            names = ("bias_tokens", "bias_values")
            tables |= {name: _laid_like(tables[name], blank[name]) for name in names}
        ruled = {row: r.allowed for row, r in requests.items() if r.allowed is not None}
        if ruled:
            allowed = self._blank(count)["allowed"]
            for row, mask in ruled.items():
                allowed[row] = mask
            tables["allowed"] = _laid_like(tables["allowed"], allowed)
        return tables

    def _blank(self, count: int) -> dict[str, np.ndarray]:
        words = -(-self._vocabulary // _BITS)
        return {
            "bias_tokens": np.full((count, MOST_BIASES), self._vocabulary, np.int32),
            "bias_values": np.zeros((count, MOST_BIASES), np.float32),
            "allowed": np.full((count, words), 2**_BITS - 1, np.uint32),
        }


def _laid_like(kept: Array, values: np.ndarray) -> Array:
    """Values on the device, on the mesh of what they replace: elsewhere a program is compiled
    anew."""
    where = kept.sharding
    return jax.device_put(values, where if isinstance(where, NamedSharding) else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How rows are sampled, what is forbidden or forced, and when they stop."""

    asked: Asked
    row_keys: Array
    pad: int = dataclasses.field(metadata={"static": True})
    # How SSM states are rounded that the cache keeps in fewer bits than they are computed in.
    rounding: str = dataclasses.field(default="stochastic", metadata={"static": True})

    @classmethod
    def create(cls, asked: Asked, pad: int, rounding: str = "stochastic") -> "Rules":
        """The rules of requests; each row's numbers hang on its seed and branch alone."""
        keys = jax.vmap(lambda seed, branch: jax.random.fold_in(jax.random.key(seed), branch))
        return cls(asked, keys(asked.seed, asked.branch), pad, rounding)

    @property
    def sampling(self) -> Sampling:
        """Each row's."""
        asked = self.asked
        return Sampling(asked.temperature, asked.top_k, asked.top_p, asked.min_p)


def shaped(
    logits: Float[Array, "B T V"], rules: Rules, given: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Logits with biases, without what a grammar forbids and without stop tokens where it is too
    early for them; `given` counts the row's tokens before each."""
    asked, vocabulary = rules.asked, logits.shape[-1]
    same = lambda logits: logits
    logits = jax.lax.cond(
        jnp.any(asked.bias_tokens < vocabulary),
        lambda logits: jax.vmap(lambda row, at, by: row.at[:, at].add(by, mode="drop"))(
            logits, asked.bias_tokens, asked.bias_values
        ),
        same,
        logits,
    )
    early = given < asked.min_tokens[:, None]
    stops = jnp.where(asked.stops < 0, vocabulary, asked.stops)

    def without_stops(logits: Array) -> Array:
        never = lambda row, at: row.at[:, at].set(-jnp.inf, mode="drop")
        return jnp.where(early[..., None], jax.vmap(never)(logits, stops), logits)

    logits = jax.lax.cond(jnp.any(early), without_stops, same, logits)

    def as_allowed(logits: Array) -> Array:
        words = jnp.repeat(asked.allowed, _BITS, axis=1)[:, :vocabulary]
        free = (words >> (jnp.arange(vocabulary, dtype=jnp.uint32) % _BITS)) & 1 > 0
        return jnp.where(free[:, None] | ~asked.grammar[:, None, None], logits, -jnp.inf)

    return jax.lax.cond(jnp.any(asked.grammar), as_allowed, same, logits)


def forced(
    tokens: Int[Array, "B n"],
    accepted: Int[Array, "B"],
    rules: Rules,
    given: Int[Array, "B"],
    thinking: Bool[Array, "B"],
) -> tuple[Int[Array, "B n"], Int[Array, "B"], Bool[Array, "B n"]]:
    """A round's tokens, of which `accepted` + 1 count, with the token that closes the reasoning
    where the budget ends; what comes after it does not count. And which one was put there.

    `given` counts a row's tokens before these, and `thinking` says whose reasoning is open.
    """
    asked, number = rules.asked, jnp.arange(tokens.shape[1])
    closes = tokens == asked.closing[:, None]
    closed = jnp.cumsum(closes, axis=1) > 0  # by the model itself, here or before
    place = asked.budget - given
    due = thinking[:, None] & (number == place[:, None])
    put = due & ~closed & (number <= accepted[:, None])
    accepted = jnp.where(jnp.any(put, axis=1), place, accepted)
    return jnp.where(put, asked.closing[:, None], tokens), accepted, put
