"""Grouped-query attention without positions, and its key/value cache."""

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.model import AttentionConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear
from nemotron_jax.sharding import local, parts, shard
from nemotron_jax.types import Context, Rows
from pallas_kernels import attention

# Logical axes of keys and values: by row, and in a pool of pages, which all rows share.
_BY_ROW = ("batch", None, "kv_heads", None)
POOL = (None, None, ("kv_heads", 2), None)  # k and v of a head


class _KeysAndValues:
    """What the states of attention have in common: what lies past a row's length is never read, so
    a length is all that it takes to forget tokens, and rows never touch each other's."""

    goes_back = True

    def select(self, count: Int[Array, "B"]) -> Self:
        return self

    def where(self, rows: Bool[Array, "B"], other: Self) -> Self:
        return self

    def emptied(self, rows: Bool[Array, "B"]) -> Self:
        return self

    def rounded(self, like: Self, narrow: Callable[[Array], Array]) -> Self:
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState(_KeysAndValues):
    """Keys and values of the tokens seen so far, each row's own."""

    k: Float[Array, "B S K C"]
    v: Float[Array, "B S K C"]

    @classmethod
    def zeros(cls, config: AttentionConfig, batch: int, capacity: int, dtype: str) -> "KVState":
        """An empty state with room for `capacity` tokens of each row."""
        shape = (batch, capacity, held_heads(config), config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        """Key/value heads of a token, repeated ones counted."""
        return self.k.shape[2]

    def shared(self, rows: str | None = "batch") -> "KVState":
        """This state laid out over the mesh: heads as devices share them, rows by the logical axis
        `rows` (None: every device has all)."""
        axes = (rows, *_BY_ROW[1:])
        return KVState(shard(self.k, *axes), shard(self.v, *axes))

    def append(
        self, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], offset: Int[Array, "B"]
    ) -> "KVState":
        """Write T tokens of every row at its own offset; the caller keeps offset + T within S."""
        capacity, num_tokens = self.k.shape[1], k.shape[1]
        if num_tokens > capacity:
            raise ValueError(
                f"KVState: T={num_tokens} tokens exceed the cache's capacity of {capacity}; "
                "give init_cache a larger max_length"
            )
        write = local(_write, (_BY_ROW, _BY_ROW, ("batch",)), _BY_ROW)
        return KVState(write(self.k, k, offset), write(self.v, v, offset))

    def attend(
        self, q: Float[Array, "B T H C"], rows: Rows, context: Context
    ) -> Float[Array, "B T H C"]:
        """Attention of the tokens just appended."""
        k, v = self.k.astype(q.dtype), self.v.astype(q.dtype)
        return _attend(q, k, v, (None, rows.lengths, rows.offset), context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV(_KeysAndValues):
    """Keys and values in pages of a pool that rows share; `table` names each row's pages in order.

    In a page the heads' keys and values take turns: k of head 0, v of head 0, k of head 1, as
    kernels for pages want them. Nothing hangs on where a page lies, for attention has no positions.
    Page 0 belongs to nobody: it takes what is written past a row's pages, and is never read within
    a row's length.
    """

    pool: Float[Array, "pages page 2K C"]
    table: Int[Array, "B W"]

    @property
    def capacity(self) -> int:
        """Tokens that a row's table has room for."""
        return self.table.shape[1] * self.pool.shape[1]

    @property
    def heads(self) -> int:
        """Key/value heads of a token, repeated ones counted."""
        return self.pool.shape[2] // 2

    def shared(self, rows: str | None = "batch") -> "PagedKV":
        """This state laid out over the mesh: heads as devices share them.

        Every device has all pages, for any row may read them.
        """
        return PagedKV(shard(self.pool, *POOL), self.table)

    def append(
        self, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], offset: Int[Array, "B"]
    ) -> "PagedKV":
        """Write T tokens of every row at its own offset; the caller keeps offset + T within the
        table, and rows that share a page beyond its tokens."""
        size = self.pool.shape[1]
        position = offset[:, None] + jnp.arange(k.shape[1])
        page = jnp.take_along_axis(self.table, position // size, axis=1, mode="clip")
        both = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3])
        put = lambda pool, new, page, place: pool.at[page, place].set(_stored(new, pool.dtype))
        write = local(put, (POOL, POOL, (None,), (None,)), POOL)  # every row's, on each device
        return PagedKV(write(self.pool, both, page, position % size), self.table)

    def attend(
        self, q: Float[Array, "B T H C"], rows: Rows, context: Context
    ) -> Float[Array, "B T H C"]:
        """Attention of the tokens just appended, over each row's own pages where they lie."""

        def over_pages(q: Array, pool: Array, table: Array, *masks: Array | None) -> Array:
            lengths, offset = masks
            return attention(
                q,
                pool,
                pages=table,
                lengths=lengths,
                q_offset=offset,
                implementation=context.kernel("attention"),
                target=context.target,
            )

        heads, by_row = ("batch", None, "heads", None), (("batch",),) * 3
        run = local(over_pages, (heads, POOL, *by_row), heads)
        return run(q, self.pool, self.table, rows.lengths, rows.offset)


class Attention(nnx.Module):
    """Causal grouped-query attention; head h reads key/value head h // (H / K)."""

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        init: Init,
    ) -> None:
        self.config = config
        query = config.num_heads * config.head_dim
        key = config.num_kv_heads * config.head_dim
        heads, kv_heads = ("heads", config.head_dim), ("kv_heads", config.head_dim)
        self.q = Linear("attention_q", ("width", heads), (width, query), init)
        self.k = Linear("attention_k", ("width", kv_heads), (width, key), init)
        self.v = Linear("attention_v", ("width", kv_heads), (width, key), init)
        self.out = Linear("attention_out", (heads, "width"), (query, width), init.out)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        state: KVState | PagedKV | None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], KVState | PagedKV | None, None]:
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (project(x, context, rows).reshape(heads) for project in (self.q, self.k, self.v))
        held = held_heads(self.config)
        if state is not None and state.heads != held:
            raise ValueError(
                f"Attention: the cache holds {state.heads} key/value heads, and these devices "
                f"share {held}; make it on the mesh that it is used on"
            )
        k, v = _repeated(k, held), _repeated(v, held)
        if state is None:
            y = _attend(q, k, v, (rows.documents, rows.lengths, None), context)
        else:
            state = state.append(k, v, rows.offset)
            y = state.attend(q, rows, context)
        return self.out(y.reshape(*x.shape[:2], -1), context, rows), state, None


def held_heads(config: AttentionConfig) -> int:
    """Key/value heads as the devices at hand hold them: repeated until each has whole ones of its
    own, which are all that its query heads read."""
    return math.lcm(config.num_kv_heads, parts("heads", config.num_heads))


def _repeated(heads: Array, count: int) -> Array:
    """[B, T, K, C] as `count` heads, each of the K several times in a row."""
    times = count // heads.shape[2]
    if times == 1:
        return heads
    # In float32, in which the gradients of the copies are then summed.
    wide = jnp.repeat(heads.astype(jnp.float32), times, axis=2).astype(heads.dtype)
    return shard(wide, *_BY_ROW)


def _attend(
    q: Array, k: Array, v: Array, masks: tuple[Array | None, ...], context: Context
) -> Float[Array, "B T H C"]:
    """Attention of each device's own rows; `masks` are documents, lengths and the cache's
    offset."""

    def attend(q: Array, k: Array, v: Array, *masks: Array | None) -> Array:
        documents, lengths, offset = masks
        return attention(
            q,
            k,
            v,
            segment_ids=documents,
            lengths=lengths,
            q_offset=offset,
            implementation=context.kernel("attention"),
            target=context.target,
        )

    heads, by_row = ("batch", None, "heads", None), (("batch",),) * len(masks)
    return local(attend, (heads, _BY_ROW, _BY_ROW, *by_row), heads)(q, k, v, *masks)


def _stored(new: Array, dtype: jnp.dtype) -> Array:
    """What a pool keeps of new keys or values; FP8 has no infinity, so it takes its largest."""
    if jnp.dtype(dtype).itemsize > 1:
        return new.astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(new, -largest, largest).astype(dtype)


def _write(cached: Array, new: Array, offset: Array) -> Array:
    write = jax.vmap(lambda row, tokens, at: jax.lax.dynamic_update_slice(row, tokens, (at, 0, 0)))
    return write(cached, new.astype(cached.dtype), offset)
