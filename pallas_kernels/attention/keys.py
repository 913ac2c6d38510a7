"""Where attention in plain XLA finds keys and values: in rows of their own, or in shared pages.

Both hand out blocks, so that nobody ever copies a row's whole cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keys and values of every row, at positions from 0 on."""

    k: Float[Array, "B S K C"]
    v: Float[Array, "B S K C"]

    @property
    def count(self) -> int:
        """Positions of a row."""
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return self.k.shape[2]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.k.shape[0]

    def width(self, wanted: int) -> int:
        """Positions of a block that should have about `wanted`."""
        return min(self.count, wanted)

    def padded(self, width: int) -> "Dense":
        """Itself: a last block moves up to end with the row."""
        del width
        return self

    def of_head(
        self, row: Array, head: Array, key: Array, width: int
    ) -> tuple[Float[Array, "1 1 keys C"], Float[Array, "1 1 keys C"]]:
        """Keys and values of one row and head from position `key` on, in float32."""
        size = (1, width, 1, self.k.shape[-1])
        block = lambda a: lax.dynamic_slice(a, (row, key, head, 0), size).swapaxes(1, 2)
        return block(self.k).astype(jnp.float32), block(self.v).astype(jnp.float32)

    def of_rows(
        self, key: Array, width: int
    ) -> tuple[Float[Array, "B keys K C"], Float[Array, "B keys K C"]]:
        """Keys and values of all rows from position `key` on, in float32."""
        block = lambda a: lax.dynamic_slice_in_dim(a, key, width, axis=1).astype(jnp.float32)
        return block(self.k), block(self.v)


@dataclasses.dataclass(frozen=True)
class Paged:
    """Keys and values in pages of a pool; `table` names each row's pages in order.

    In a page, keys and values of a head follow one another: k of head 0, v of head 0, k of head 1.
    """

    pool: Float[Array, "pages page 2K C"]
    table: Int[Array, "B W"]

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.pool.shape[1]

    @property
    def count(self) -> int:
        """Positions of a row."""
        return self.table.shape[1] * self.page

    @property
    def heads(self) -> int:
        """Key/value heads: each has two in a page, k and v."""
        return self.pool.shape[2] // 2

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.table.shape[0]

    def width(self, wanted: int) -> int:
        """Positions of a block that should have about `wanted`: whole pages."""
        return self.page * min(self.table.shape[1], max(1, wanted // self.page))

    def padded(self, width: int) -> "Paged":
        """These pages with page 0 behind each row's own, up to whole blocks of `width` tokens."""
        missing = -self.table.shape[1] % (width // self.page)
        return Paged(self.pool, jnp.pad(self.table, ((0, 0), (0, missing))))

    def taken(self, rows: Int[Array, "R"] | slice) -> "Paged":
        """Some rows, in this order."""
        return Paged(self.pool, self.table[rows])

    def until(self, end: Int[Array, "B"]) -> "Paged":
        """These pages, with page 0 for each that lies past its row's end: nobody reads them."""
        own = jnp.arange(self.table.shape[1]) * self.page < end[:, None]
        return Paged(self.pool, jnp.where(own, self.table, 0))

    def of_head(
        self, row: Array, head: Array, key: Array, width: int
    ) -> tuple[Float[Array, "1 1 keys C"], Float[Array, "1 1 keys C"]]:
        """Keys and values of one row and head from position `key` on, in float32; `key` begins a
        page, and `width` is whole pages."""
        pages = lax.dynamic_slice(self.table, (row, key // self.page), (1, width // self.page))
        size = (1, self.page, 2, self.pool.shape[-1])
        page = lambda number: lax.dynamic_slice(self.pool, (number, 0, 2 * head, 0), size)
        block = jax.vmap(page)(pages[0]).reshape(1, 1, width, 2, -1).astype(jnp.float32)
        return block[..., 0, :], block[..., 1, :]

    def of_rows(
        self, key: Array, width: int
    ) -> tuple[Float[Array, "B keys K C"], Float[Array, "B keys K C"]]:
        """Keys and values of all rows from position `key` on, in float32; as in `of_head`."""
        size = width // self.page
        pages = lax.dynamic_slice_in_dim(self.table, key // self.page, size, axis=1)
        block = self.pool[pages].reshape(self.rows, width, self.heads, 2, -1)
        return block[..., 0, :].astype(jnp.float32), block[..., 1, :].astype(jnp.float32)
