"""What decoding remembers: per layer a Mamba-2 state or keys and values, and how many tokens they
hold."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.model import ModelConfig
from nemotron_jax.layers.attention import KVState
from nemotron_jax.layers.mamba2 import MambaState
from nemotron_jax.layers.state import LayerState, chosen
from nemotron_jax.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One state per layer, None where a layer keeps none; `length` counts each row's tokens.

    States are of any kind in layers/state.py, whose rules are their own. After a call with
    `every_state`, `start` holds the lengths before it, and `select` brings the cache to the state
    after as many of the call's tokens as a row keeps.

    For drafting, `mtp` is the MTP block's own cache and `hidden` the backbone's state of each row's
    last token. Entry i of `mtp` is made of hidden state i and token i + 1, so at rest it is one
    token behind: `hidden` waits for the token that follows.

    A call that writes past `capacity` leaves its row's length at capacity + 1 for good, and
    `overflowed` tells.
    """

    layers: tuple
    length: Int[Array, "B"]
    start: Int[Array, "B"] | None = None
    mtp: "Cache | None" = None
    hidden: Float[Array, "B D"] | None = None

    @classmethod
    def zeros(
        cls, config: ModelConfig, pattern: str, batch: int, capacity: int, dtype: str
    ) -> "Cache":
        """An empty cache of the layers of `pattern`: `batch` rows with room for `capacity` tokens,
        keys, values and tails in `dtype`. Without the MTP block's."""

        def state(letter: str) -> KVState | MambaState | None:
            if letter == "*":
                return KVState.zeros(config.attention, batch, capacity, dtype)
            return MambaState.zeros(config.mamba, batch, dtype) if letter == "M" else None

        return cls(tuple(state(letter) for letter in pattern), jnp.zeros(batch, jnp.int32))

    def shared(self) -> "Cache":
        """This cache laid out over the mesh; programs that begin and end so hand it on uncopied."""
        return dataclasses.replace(
            self,
            layers=self._each(lambda state: state.shared()),
            length=shard(self.length, "batch"),
            mtp=self.mtp and self.mtp.shared(),
            hidden=None if self.hidden is None else shard(self.hidden, "batch", None),
        )

    @property
    def capacity(self) -> int | None:
        """Tokens that a row has room for; None without attention, whose states never grow."""
        sizes = [state.capacity for state in self._states() if state.capacity is not None]
        return min(sizes, default=None)

    def overflowed(self) -> Bool[Array, "B"]:
        """Which rows were written past their end; nothing that they hold can be trusted."""
        if self.capacity is None:
            return jnp.zeros(self.length.shape, bool)
        return self.length > self.capacity

    def advance(
        self, layers: tuple, num_tokens: int, lengths: Int[Array, "B"] | None, every_state: bool
    ) -> "Cache":
        """The cache after a call that wrote `num_tokens` to each row, `lengths` of them valid."""
        length = self.length + (num_tokens if lengths is None else lengths)
        if self.capacity is not None:
            full = self.length + num_tokens > self.capacity
            length = jnp.where(full, self.capacity + 1, length)
        start = self.length if every_state else None
        return dataclasses.replace(self, layers=layers, length=length, start=start)

    def select(self, count: Int[Array, "B"]) -> "Cache":
        """The cache as it was after the first `count` of the last call's tokens, by row: none
        leaves the row as it was before the call."""
        if self.start is None:
            raise ValueError(
                "Cache.select: this cache holds one state per row; "
                "call the model with every_state=True"
            )
        layers = self._each(lambda state: state.select(count))
        outgrown = self.overflowed() & (count > 0)
        length = jnp.where(outgrown, self.length, self.start + count)
        return dataclasses.replace(self, layers=layers, length=length, start=None)

    def truncate(self, length: Int[Array, "B"]) -> "Cache":
        """The cache with rows cut to at most `length` tokens.

        Attention forgets any number of tokens. A Mamba state cannot go back further than the last
        call, and only if that kept every state; otherwise ValueError.
        """
        if self.start is not None:
            return self.select(jnp.minimum(length, self.length) - self.start)
        if not all(state.goes_back for state in self._states()):
            raise ValueError(
                "Cache.truncate: a Mamba state does not go back; call the model with "
                "every_state=True, or put a cache that was kept at the wanted length"
            )
        return dataclasses.replace(self, length=jnp.minimum(self.length, length))

    def where(self, rows: Bool[Array, "B"], other: "Cache") -> "Cache":
        """The given rows of this cache, and the rest of `other`, from which this one came.

        Keys and values are this one's: those that it alone holds lie past the other rows' lengths.
        """
        self._check_selected("where")
        mtp, hidden = self.mtp, self.hidden
        return dataclasses.replace(
            self,
            layers=self._each(lambda mine, theirs: mine.where(rows, theirs), other),
            length=chosen(rows, self.length, other.length),
            mtp=None if mtp is None else mtp.where(rows, other.mtp),
            hidden=None if hidden is None else chosen(rows, hidden, other.hidden),
        )

    def reset(self, rows: Bool[Array, "B"]) -> "Cache":
        """The cache with the given rows empty, as new."""
        self._check_selected("reset")
        kept, hidden = ~rows, self.hidden
        return dataclasses.replace(
            self,
            layers=self._each(lambda state: state.emptied(rows)),
            length=chosen(kept, self.length, 0),
            mtp=None if self.mtp is None else self.mtp.reset(rows),
            hidden=None if hidden is None else chosen(kept, hidden, jnp.zeros((), hidden.dtype)),
        )

    def rounded(self, like: "Cache", narrow: Callable[[int, Array], Array]) -> "Cache":
        """The cache with recurrent states kept as those of `like` are; `narrow` is told the layer
        and a state that must go into fewer bits."""
        layers = tuple(
            state and state.rounded(before, functools.partial(narrow, layer))
            for layer, (state, before) in enumerate(zip(self.layers, like.layers, strict=True))
        )
        return dataclasses.replace(self, layers=layers)

    def put(self, row: Int[Array, ""] | int, other: "Cache", other_row: int = 0) -> "Cache":
        """The cache with one row replaced by a row of another, whose capacity may be smaller.

        Raises ValueError where the two cannot hold the same states.
        """
        if jax.tree.structure(self) != jax.tree.structure(other):
            raise ValueError(
                "Cache.put: the other cache has other parts; make both by the same model's "
                "init_cache, with or without mtp, and select after every_state"
            )
        if (self.capacity or 0) < (other.capacity or 0):
            raise ValueError(
                f"Cache.put: the other cache has capacity {other.capacity}, this one "
                f"{self.capacity}; it must be at least as large"
            )

        def write(mine: Array, theirs: Array) -> Array:
            piece = theirs[other_row : other_row + 1].astype(mine.dtype)
            return jax.lax.dynamic_update_slice(mine, piece, (row, *(0,) * (mine.ndim - 1)))

        written = jax.tree.map(write, self, other)
        # The row's mark of an overflow is one past its own capacity, which may be smaller.
        if self.capacity is None:
            return written
        mark = jnp.where(other.overflowed()[other_row], self.capacity + 1, other.length[other_row])
        return dataclasses.replace(written, length=written.length.at[row].set(mark))

    def _states(self) -> Iterator[LayerState]:
        """Those of the layers that keep one."""
        return (state for state in self.layers if state is not None)

    def _each(self, function: Callable[..., LayerState], *others: "Cache") -> tuple:
        """Each layer's state, and those of other caches with it, through a function."""
        layers = zip(self.layers, *(other.layers for other in others), strict=True)
        return tuple(None if states[0] is None else function(*states) for states in layers)

    def _check_selected(self, what: str) -> None:
        if self.start is not None:
            raise ValueError(
                f"Cache.{what}: the last call kept every state; select how many tokens stand first"
            )
