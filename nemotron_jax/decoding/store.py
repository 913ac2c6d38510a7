"""The engine's memory on the device, and the programs that work on it.

Keys and values lie in pages that rows share; a slot holds the recurrent states of one row, and a
snapshot those of some row at some length. Which pages and how many tokens a slot has is the
scheduler's to know: every program is told.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding.loop import Fed, Loop, Sizes, begin, run_rounds
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.rounding import keep_states
from nemotron_jax.decoding.rules import Asked, Rules
from nemotron_jax.decoding.speculative import Given, Standing, draft
from nemotron_jax.decoding.step import feed_drafter, last_hidden, prefill_chunk
from nemotron_jax.layers.attention import POOL, PagedKV, held_heads
from nemotron_jax.layers.mamba2 import MambaState
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import current_mesh, on_every_device, replicated, shard


class _Structure:
    """A tree's structure that is hashed once, and compared by identity where it can be."""

    def __init__(self, tree: jax.tree_util.PyTreeDef) -> None:
        self.tree, self._hash = tree, hash(tree)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatModel:
    """A model as a tuple of arrays. A program that is called with a model takes it apart in Python
    first, module by module: 4 ms of host time for 135 modules, at every call."""

    leaves: tuple[Array, ...]
    structure: _Structure = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, model: Nemotron) -> "FlatModel":
        """The leaves of a model as one flat argument of a program."""
        leaves, tree = jax.tree.flatten(model)
        return cls(tuple(leaves), _Structure(tree))

    def model(self) -> Nemotron:
        """The model again."""
        return jax.tree.unflatten(self.structure.tree, self.leaves)


# Keys and values of one attention layer in pages, as `PagedKV` lays them out; page 0 belongs to
# nobody.
Pool = Float[Array, "pages page 2K C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
    """What is kept of rows beside pages: Mamba states by layer, and the last token's hidden
    state."""

    layers: tuple[MambaState | None, ...]
    hidden: Float[Array, "B D"]

    def shared(self, rows: str | None) -> "States":
        """These states laid out over the mesh: heads as devices share them, rows by the logical
        axis `rows` (None: every device has all)."""
        layers = tuple(state and state.shared(rows) for state in self.layers)
        return States(layers, shard(self.hidden, rows, None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
    """All that the engine keeps on the device beside the model."""

    pools: tuple[Pool | None, ...]  # by layer
    mtp_pools: tuple[Pool | None, ...] | None  # of the MTP block; None without speculation
    slots: States
    snapshots: States | None  # None inside prefill and decoding, which have no use for them
    rounding: str = dataclasses.field(metadata={"static": True})  # of states in few bits

    @classmethod
    def create(cls, model: Nemotron, engine: EngineConfig) -> "Store":
        """An empty store where the programs want it: on the mesh that is set, or with the model."""
        if current_mesh() is not None:
            return jax.jit(lambda: cls.empty(model, engine))()
        home = model.embedding[...].sharding
        if isinstance(home, NamedSharding):
            home = replicated(home.mesh)
        # Committed, as what programs give back is.
        return jax.device_put(cls.empty(model, engine), home)

    @classmethod
    def empty(cls, model: Nemotron, engine: EngineConfig) -> "Store":
        """A store that holds nothing; its pages are one more than the engine's, which belongs to
        nobody."""
        config, dtype = model.config, model.embedding[...].dtype
        formats, sizes = engine.cache, (engine.num_pages + 1, engine.page_tokens)
        kv = dtype if formats.kv == "auto" else jnp.dtype(formats.kv)
        ssm, _, rounding = formats.states.partition("_")

        def pools(pattern: str) -> tuple[Pool | None, ...]:
            def new() -> Pool:
                heads = (2 * held_heads(config.attention), config.attention.head_dim)
                return jnp.zeros((*sizes, *heads), kv)

            return tuple(new() if letter == "*" else None for letter in pattern)

        def states(rows: int) -> States:
            def one() -> MambaState:
                state = MambaState.zeros(config.mamba, rows, dtype)
                return dataclasses.replace(state, ssm=state.ssm.astype(ssm))

            layers = tuple(one() if letter == "M" else None for letter in config.pattern)
            return States(layers, jnp.zeros((rows, config.width), dtype))

        mtp_pools = pools(config.mtp.pattern) if engine.most_drafts else None
        kept = states(engine.slots), states(engine.snapshots)
        return _placed(cls(pools(config.pattern), mtp_pools, *kept, rounding or "stochastic"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillRows:
    """What a prefill call is told of every row; one that fills the call up names a slot that does
    not exist."""

    slot: Int[np.ndarray, "B"]
    table: Int[np.ndarray, "B W"]
    start: Int[np.ndarray, "B"]  # tokens in its cache
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """What a decode call is told of every row; arrays of numpy, so that telling is one transfer.

    Rows are all slots in order, or fewer of any. One that does not decode has no pages and no
    length, and names a slot that does not exist where rows are not all slots.
    """

    slot: Int[np.ndarray, "B"]
    table: Int[np.ndarray, "B W"]
    length: Int[np.ndarray, "B"]  # tokens in its cache
    token: Int[np.ndarray, "B"]  # the newest, which the cache does not hold
    fresh: Bool[np.ndarray, "B"]  # its prompt has just been read: no token yet
    active: Bool[np.ndarray, "B"]
    asked: Asked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a decode call gave each row."""

    given: Given  # [B, N]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]
    length: Int[Array, "B"]  # tokens in its cache now


@functools.partial(jax.jit, static_argnames="execution", donate_argnums=1)
def prefill(
    weights: FlatModel, store: Store, rows: PrefillRows, *, execution: Execution = Execution()
) -> tuple[Store, Float[Array, "B T D"]]:
    """The store after one chunk of a few slots' prompts, and the hidden states of its tokens.

    A slot that starts at 0 starts from nothing, whatever its last tenant left.
    """
    start, lengths = rows.start, rows.lengths
    taken = _taken(store.slots, rows.slot)
    empty = lambda a: jnp.where((start == 0).reshape(-1, *(1,) * (a.ndim - 1)), 0, a)
    before = _cache(store, jax.tree.map(empty, taken), rows.table, start)
    model = weights.model()
    cache, hidden = prefill_chunk(model, before, rows.tokens, lengths, execution=execution)
    cache = keep_states(cache, before, store.rounding)
    last = jnp.where((lengths > 0)[:, None], last_hidden(hidden, lengths), 0)
    states = States(_recurrent(store, cache), last)
    return _stored(store, cache, _put(store.slots, rows.slot, states)), hidden


@functools.partial(jax.jit, static_argnames=("sizes", "execution"), donate_argnums=1)
def decode(
    weights: FlatModel,
    store: Store,
    rows: DecodeRows,
    rounds: Int[Array, ""],
    *,
    sizes: Sizes,
    execution: Execution = Execution(),
) -> tuple[Store, Decoded]:
    """The store after first tokens where they are due and then at most `rounds` rounds, and what
    they gave.

    Where a store that has drafts decodes without, the MTP block reads what was given at the end, in
    one piece: it is read for a fraction of what a round with drafts costs, and can go on at once.
    """
    model = weights.model()
    whole = len(rows.slot) == len(store.slots.hidden)
    states = store.slots if whole else _taken(store.slots, rows.slot)
    cache = _cache(store, states, rows.table, rows.length)
    rules = Rules.create(rows.asked, model.config.pad_token, store.rounding)
    later = store.mtp_pools is not None and sizes.speculative == 0
    alone = dataclasses.replace(cache, mtp=None, hidden=None) if later else cache
    loop = Loop.create(alone, rows.token, ~rows.active, rules, sizes)
    if later:
        loop = dataclasses.replace(loop, fed=Fed.blank(states.hidden, sizes.capacity - 1))
    loop = begin(model, loop, states.hidden, rows.fresh, rules, execution=execution)
    loop = run_rounds(model, loop, rules, sizes, most_rounds=rounds, execution=execution)
    after = loop.cache
    if later:
        fed = loop.fed.hidden, loop.fed.tokens
        after = feed_drafter(model, cache, after, *fed, execution=execution)
    hidden = states.hidden if after.hidden is None else after.hidden
    states = States(_recurrent(store, after), hidden)
    slots = states if whole else _put(store.slots, rows.slot, states)
    given = Decoded(loop.given, loop.lengths, loop.done, after.length)
    return _stored(store, after, slots), given


@functools.partial(jax.jit, static_argnames=("count", "execution"), donate_argnums=1)
def draft_alone(
    weights: FlatModel,
    store: Store,
    rows: DecodeRows,
    *,
    count: int,
    execution: Execution = Execution(),
) -> tuple[Store, Int[Array, "B k"]]:
    """Drafts of slots that nothing runs in, to see how long they take."""
    model = weights.model()
    whole = len(rows.slot) == len(store.slots.hidden)
    states = store.slots if whole else _taken(store.slots, rows.slot)
    cache = _cache(store, states, rows.table, rows.length)
    rules = Rules.create(rows.asked, model.config.pad_token, store.rounding)
    at = Standing(cache, rows.token, rows.asked.given, ~rows.active)
    cache, tokens, _ = draft(model, at, count, rules, execution=execution)
    return _stored(store, cache, store.slots), tokens


@functools.partial(jax.jit, donate_argnums=0)
def save_snapshot(store: Store, slot: Int[Array, ""], snapshot: Int[Array, ""]) -> Store:
    """The store with a slot's states kept in a snapshot too."""
    snapshots = _copied(store.snapshots, snapshot, store.slots, slot)
    return _placed(dataclasses.replace(store, snapshots=snapshots))


@functools.partial(jax.jit, donate_argnums=0)
def load_snapshot(
    store: Store,
    snapshot: Int[Array, ""],
    slot: Int[Array, ""],
    page: Int[Array, ""],
    new_page: Int[Array, ""],
) -> Store:
    """The store with a snapshot's states in a slot, and a page copied: the last one of the
    snapshot's row, if it is not full. Page 0 twice copies none."""
    copy = lambda pool: pool.at[new_page].set(pool[page])
    pools, mtp_pools = jax.tree.map(copy, (store.pools, store.mtp_pools))
    slots = _copied(store.slots, slot, store.snapshots, snapshot)
    return _placed(dataclasses.replace(store, pools=pools, mtp_pools=mtp_pools, slots=slots))


class Scores(NamedTuple):
    """Log-probabilities of what follows some hidden states."""

    logprobs: Float[Array, "B T"]
    likeliest: Int[Array, "B T"]  # the likeliest token there
    of_likeliest: Float[Array, "B T"]

    def give(self, request: Request, start: int, row: int, count: int) -> None:
        """Tell a request of `count` tokens of its prompt, after those whose scores it has."""
        rows = [np.asarray(part)[row, :count].tolist() for part in self]
        request.prompt_logprobs[start:] = rows[0]
        request.prompt_likeliest[start:] = zip(rows[1], rows[2], strict=True)


@functools.partial(jax.jit, static_argnames="execution")
def score(
    weights: FlatModel,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    execution: Execution = Execution(),
) -> Scores:
    """Log-probabilities of the token that follows each hidden state, and of the likeliest one."""
    logits = weights.model().logits(hidden, execution=execution)
    total = jax.nn.logsumexp(logits, axis=-1)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    of = lambda ids: jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - total
    return on_every_device(Scores(of(targets), likeliest, of(likeliest)))


def _cache(store: Store, states: States, table: Array, length: Array) -> Cache:
    """The rows of some states as the model wants them."""

    def paged(pools: tuple) -> tuple:
        return tuple(None if pool is None else PagedKV(pool, table) for pool in pools)

    layers = tuple(
        paged_layer or state
        for paged_layer, state in zip(paged(store.pools), states.layers, strict=True)
    )
    if store.mtp_pools is None:
        return Cache(layers, length)
    mtp = Cache(paged(store.mtp_pools), jnp.maximum(length - 1, 0))
    return Cache(layers, length, mtp=mtp, hidden=states.hidden)


def _recurrent(store: Store, cache: Cache) -> tuple[MambaState | None, ...]:
    """The states of the layers that slots keep one for."""
    pairs = zip(cache.layers, store.slots.layers, strict=True)
    return tuple(None if slots is None else state for state, slots in pairs)


def _stored(store: Store, cache: Cache, slots: States) -> Store:
    """The store with the cache's pages and these slots."""

    def pools(layers: tuple, pools: tuple) -> tuple[Pool | None, ...]:
        pairs = zip(layers, pools, strict=True)
        return tuple(None if pool is None else state.pool for state, pool in pairs)

    mtp_pools = None if cache.mtp is None else pools(cache.mtp.layers, store.mtp_pools)
    pages = pools(cache.layers, store.pools)
    return _placed(dataclasses.replace(store, pools=pages, mtp_pools=mtp_pools, slots=slots))


def _placed(store: Store) -> Store:
    """The store as devices share it, always alike, so that no program is compiled for another way:
    slots by row and head, pages and snapshots whole but for their heads."""
    by_head = lambda pool: shard(pool, *POOL)
    pools, mtp_pools = jax.tree.map(by_head, (store.pools, store.mtp_pools))
    slots = store.slots.shared("batch")
    snapshots = store.snapshots and store.snapshots.shared(None)
    return Store(pools, mtp_pools, slots, snapshots, store.rounding)


def _taken(states: States, rows: Int[Array, "R"]) -> States:
    """Some rows; whatever stands in one that does not exist means nothing."""
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=0, mode="clip"), states)


def _put(into: States, rows: Int[Array, "R"], states: States) -> States:
    """`into` with some rows replaced; one that does not exist is dropped."""
    write = lambda mine, new: mine.at[rows].set(new, mode="drop")
    return jax.tree.map(write, into, states)


def _copied(into: States, at: Array, of: States, place: Array) -> States:
    """`into` with its row `at` replaced by the other's row `place`."""
    copy = lambda mine, theirs: mine.at[at].set(theirs[place])
    return jax.tree.map(copy, into, of)
