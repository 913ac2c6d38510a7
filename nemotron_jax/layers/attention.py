"""Grouped-query attention without positions, and its key/value cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nemotron_jax.config.model import AttentionConfig
from nemotron_jax.layers.linear import Linear
from nemotron_jax.sharding import local
from nemotron_jax.types import Context, Rows
from pallas_kernels import attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values of the tokens seen so far; what lies past the cache's length is never
    read."""

    k: Float[Array, "B S K C"]
    v: Float[Array, "B S K C"]

    @classmethod
    def zeros(cls, config: AttentionConfig, batch: int, capacity: int, dtype: str) -> "KVState":
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

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
        return KVState(_write(self.k, k, offset), _write(self.v, v, offset))

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def read(self, dtype: jnp.dtype) -> tuple[Float[Array, "B S K C"], Float[Array, "B S K C"]]:
        """Every row's keys and values, for queries in `dtype`."""
        return self.k.astype(dtype), self.v.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values in pages of a pool that rows share; `table` names each row's pages in order.

    Nothing hangs on where a page lies, for attention has no positions. Page 0 belongs to nobody: it
    takes what is written past a row's pages, and is never read within a row's length.
    """

    k: Float[Array, "pages page K C"]
    v: Float[Array, "pages page K C"]
    table: Int[Array, "B W"]

    def append(
        self, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], offset: Int[Array, "B"]
    ) -> "PagedKV":
        """Write T tokens of every row at its own offset; the caller keeps offset + T within the
        table, and rows that share a page beyond its tokens."""
        size = self.k.shape[1]
        position = offset[:, None] + jnp.arange(k.shape[1])
        page = jnp.take_along_axis(self.table, position // size, axis=1, mode="clip")
        write = lambda pool, new: pool.at[page, position % size].set(_stored(new, pool.dtype))
        return PagedKV(write(self.k, k), write(self.v, v), self.table)

    @property
    def capacity(self) -> int:
        """Tokens that a row's table has room for."""
        return self.table.shape[1] * self.k.shape[1]

    def read(self, dtype: jnp.dtype) -> tuple[Float[Array, "B S K C"], Float[Array, "B S K C"]]:
        """Every row's keys and values, gathered from its pages, for queries in `dtype`."""
        rows = lambda pool: pool[self.table].reshape(len(self.table), -1, *pool.shape[2:])
        return rows(self.k).astype(dtype), rows(self.v).astype(dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention; head h reads key/value head h // (H / K)."""

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        *,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        dtype: str = "float32",
    ) -> None:
        self.config = config
        query = config.num_heads * config.head_dim
        key = config.num_kv_heads * config.head_dim
        options = {"std": std, "rngs": rngs, "dtype": dtype}
        heads, kv_heads = ("heads", config.head_dim), ("kv_heads", config.head_dim)
        self.q = Linear("attention_q", ("width", heads), (width, query), **options)
        self.k = Linear("attention_k", ("width", kv_heads), (width, key), **options)
        self.v = Linear("attention_v", ("width", kv_heads), (width, key), **options)
        options["std"] = out_std
        self.out = Linear("attention_out", (heads, "width"), (query, width), **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        state: KVState | PagedKV | None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], KVState | PagedKV | None, None]:
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (project(x, context, rows).reshape(heads) for project in (self.q, self.k, self.v))
        if state is None:
            y = _attend(q, k, v, (rows.documents, rows.lengths, None), context)
        else:
            state = state.append(k, v, rows.offset)
            y = _attend(q, *state.read(q.dtype), (None, rows.lengths, rows.offset), context)
        return self.out(y.reshape(*x.shape[:2], -1), context, rows), state, None


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

    heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    by_row = (("batch",),) * len(masks)
    return local(attend, (heads, kv_heads, kv_heads, *by_row), heads)(q, k, v, *masks)


def _stored(new: Array, dtype: jnp.dtype) -> Array:
    """What a pool keeps of new keys or values; FP8 has no infinity, so it takes its largest."""
    if jnp.dtype(dtype).itemsize > 1:
        return new.astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(new, -largest, largest).astype(dtype)


def _write(cached: Array, new: Array, offset: Array) -> Array:
    write = jax.vmap(lambda row, tokens, at: jax.lax.dynamic_update_slice(row, tokens, (at, 0, 0)))
    return write(cached, new.astype(cached.dtype), offset)
