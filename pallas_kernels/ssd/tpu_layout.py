"""What both directions of the scan on TPU share: how arrays are cut, and the decays of a chunk.

Letters beyond those of the op: Q tokens of a chunk, R heads of a group, W = R P channels of one.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128  # of a register; time and the state's N lie along them, so both come in multiples
CHUNK = LANES  # tokens of a step: fewer would leave lanes empty, more mix more pairs of tokens
LOG2_E = math.log2(math.e)  # decays are powers of two inside: one instruction less than exp
VMEM_LIMIT = 48 * 2**20  # bytes of fast memory; the least any supported chip has is 64 MiB

Interpret = bool | pltpu.InterpretParams


class Blocks(NamedTuple):
    """The block of one step in each kind of array; `order` maps a step to its chunk."""

    channels: pl.BlockSpec  # [B, T, M P]
    heads: pl.BlockSpec  # [B, M, T]
    head: pl.BlockSpec  # [G, R, 1]
    shared: pl.BlockSpec  # [B, T, G N]
    state: pl.BlockSpec  # [B, M P, N]
    states: pl.BlockSpec  # [B, chunks, M P, N]
    documents: pl.BlockSpec  # [B, 1, T]
    sums: pl.BlockSpec  # [B, M, Q], the same for every chunk


class Sizes(NamedTuple):
    """How rows are cut into chunks, and the heads into groups and tiles of one register's lanes."""

    batch: int
    tokens: int
    groups: int
    group_heads: int
    head_dim: int
    state_size: int
    chunk: int
    tile_heads: int  # heads whose channels are transposed together

    @classmethod
    def of(cls, x: Array, B: Array, chunk: int) -> "Sizes":
        """The sizes of operands x [B T M P] and B [B T G N]; as many heads in a tile as fit into
        the lanes and divide a group."""
        (batch, tokens, heads, head_dim), (groups, state_size) = x.shape, B.shape[2:]
        most = max(1, LANES // head_dim)
        tile = next(n for n in range(most, 0, -1) if heads // groups % n == 0)
        sizes = groups, heads // groups, head_dim, state_size
        return cls(batch, tokens, *sizes, min(chunk, CHUNK), tile)

    @property
    def chunks(self) -> int:
        """Chunks of a row, the last one padded."""
        return -(-self.tokens // self.chunk)

    @property
    def padded(self) -> int:
        """Tokens of a row, padded to whole chunks."""
        return self.chunks * self.chunk

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.group_heads * self.head_dim

    @property
    def states(self) -> tuple[int, int]:
        """The shape of a row's states: channels of all groups, states."""
        return self.groups * self.width, self.state_size

    def blocks(self, *, reverse: bool = False) -> Blocks:
        """Blocks of the grid [batch, groups, chunks], the last chunk first if `reverse`."""
        Q, R, W, N, last = (
            self.chunk,
            self.group_heads,
            self.width,
            self.state_size,
            self.chunks - 1,
        )

        def spec(shape: tuple[int | None, ...], place: Any) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda b, g, c: place(b, g, last - c if reverse else c))

        return Blocks(
            channels=spec((None, Q, W), lambda b, g, c: (b, c, g)),
            heads=spec((None, R, Q), lambda b, g, c: (b, g, c)),
            head=spec((None, R, 1), lambda b, g, c: (g, 0, 0)),
            shared=spec((None, Q, N), lambda b, g, c: (b, c, g)),
            state=spec((None, W, N), lambda b, g, c: (b, g, 0)),
            states=spec((None, None, W, N), lambda b, g, c: (b, c, g, 0)),
            documents=spec((None, 1, Q), lambda b, g, c: (b, 0, c)),
            sums=spec((None, R, Q), lambda b, g, c: (b, g, 0)),
        )

    def operands(self, *given: Any) -> tuple[Array, ...]:
        """The op's operands as the blocks cut them; padding has dt = 0 and so changes no state."""
        x, dt, A, B, C, D, state, documents = given
        head = (self.groups, self.group_heads, 1)
        if documents is None:
            documents = jnp.zeros((self.batch, self.tokens), jnp.int32)
        return (
            self.rows(x),
            jnp.swapaxes(self.rows(dt.astype(jnp.float32)), 1, 2),
            A.astype(jnp.float32).reshape(head),
            self.rows(B),
            self.rows(C),
            D.astype(jnp.float32).reshape(head),
            state.reshape(self.batch, *self.states),
            self.starts(documents)[:, None],
        )

    def rows(self, array: Array, mode: str = "constant") -> Float[Array, "B T _"]:
        """[B, T, ...] with the axes past the tokens as one, padded to whole chunks."""
        array = array.reshape(self.batch, self.tokens, -1)
        missing = self.padded - self.tokens
        return jnp.pad(array, ((0, 0), (0, missing), (0, 0)), mode=mode) if missing else array

    def rows_out(self, rows: Array, like: Array) -> Array:
        """Rows without the padding, in the shape and dtype of `like`."""
        return rows[:, : self.tokens].reshape(like.shape).astype(like.dtype)

    def starts(self, documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Document starts since the token before the chunk; the row's first token starts none."""
        cut = self.rows(documents, "edge").reshape(self.batch, self.chunks, self.chunk)
        before = jnp.pad(cut[:, :-1, -1], ((0, 0), (1, 0)))
        return (cut - before[..., None]).reshape(self.batch, -1)

    def cost(self, itemsize: int, products: int) -> pl.CostEstimate:
        """Of `products` times the work of a forward pass."""
        tokens, heads = self.batch * self.padded, self.groups * self.group_heads
        pairs = self.chunk * (self.groups * self.state_size + heads * self.head_dim)
        states = 2 * heads * self.head_dim * self.state_size
        row = 2 * (heads * self.head_dim + self.groups * self.state_size) * itemsize + 4 * heads
        return pl.CostEstimate(
            flops=products * 2 * tokens * (pairs + states),
            bytes_accessed=products * tokens * row,
            transcendentals=products * tokens * heads * self.chunk,
        )


def compiler_params() -> pltpu.CompilerParams:
    """Of a grid [batch, groups, chunks] whose chunks follow one another."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


class Tokens(NamedTuple):
    """What the heads of a group share in a chunk, and the decays along it; logs are to base 2."""

    dt: Float[Array, "R Q"]
    log: Float[Array, "R Q"]  # from the chunk's start to the token
    log_down: Float[Array, "Q R"]  # the same with time along the sublanes
    entering: Float[Array, "R Q"]  # factor from the incoming state to the token
    leaving: Float[Array, "R Q"]  # factor from the token to the outgoing state
    whole: Float[Array, "R 1"]  # factor from the incoming to the outgoing state
    document: Int[Array, "1 Q"]  # document starts since the token before the chunk
    document_down: Int[Array, "Q 1"]


def read_tokens(dt_ref: Any, A_ref: Any, documents_ref: Any) -> Tokens:
    """Decays of a chunk in float32, from dt [R, Q], A [R, 1] and document starts [1, Q]."""
    dt, document = dt_ref[...], documents_ref[...]
    Q = dt.shape[1]
    log = exact(dt * (A_ref[...] * LOG2_E), up_to(Q))
    last, end = document[:, Q - 1 :], log[:, Q - 1 :]
    # Masked before the exponential: what another document left behind may be beyond all numbers.
    entering = jnp.exp2(jnp.where(document == 0, log, -jnp.inf))
    leaving = jnp.exp2(jnp.where(document == last, jnp.minimum(end - log, 0), -jnp.inf))
    whole = jnp.exp2(jnp.where(last == 0, end, -jnp.inf))
    down = jnp.transpose(jnp.broadcast_to(document, (8, Q)))[:, :1]
    return Tokens(dt, log, jnp.transpose(log), entering, leaving, whole, document, down)


def up_to(size: int) -> Float[Array, "Q Q"]:
    """[s, t] = 1 where s <= t: a product with it sums over the tokens up to each."""
    s, t = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(s <= t, 1.0, 0.0)


def exact(left: Array, right: Array) -> Float[Array, "a b"]:
    """left @ right of float32 operands, in as many passes as float32 needs."""
    return jnp.dot(left, right, precision="highest", preferred_element_type=jnp.float32)


def dot(left: Array, right: Array, left_axis: int = 1, right_axis: int = 0) -> Array:
    """A product accumulated in float32; float32 operands in one bfloat16 pass would not be such."""
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision="highest" if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def by_channel(rows: Float[Array, "R _"], heads: range, channels: int) -> Float[Array, "w _"]:
    """Rows of some heads, repeated for each of a head's channels."""
    shape = (channels, rows.shape[1])
    return jnp.concatenate([jnp.broadcast_to(rows[h : h + 1], shape) for h in heads])
