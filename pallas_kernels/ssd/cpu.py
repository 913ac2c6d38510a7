"""The selective scan in chunks: matrix products inside a chunk, a carried state between chunks.

One loop goes over the chunks of the rows, so that what it works on stays in a cache and memory does
not grow with T times Q. Letters beyond those of the op: Q tokens of a chunk, R heads of a group,
and W = R P, the channels of a group, whose heads share the products with B and C. Layouts make
nearly every product a plain [m, k] x [k, n] under leading axes [B, G] or [B, G, R], and the state
[N, W]: a CPU pays more for transposing an operand than for the product. Operands of products have
x's dtype and are accumulated in float32; decays and states are float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Tokens of a chunk, or half the state size where that is more: on a CPU the fastest of 16, 32, 64
# and 128 for N = 32, 64 and 128. Shorter chunks carry the state more often, longer ones mix more
# pairs of tokens.
CHUNK = 32

product = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class Operands(NamedTuple):
    """The operands per token, heads split into groups; of whole rows, or of one chunk (T = Q)."""

    x: Float[Array, "B T G R P"]
    dt: Float[Array, "B T G R"]
    B: Float[Array, "B T G N"]
    C: Float[Array, "B T G N"]
    documents: Int[Array, "B T"] | None  # document starts since the token before the chunk


class Decays(NamedTuple):
    """Factors by which a contribution shrinks on its way; 0 where a document starts between."""

    log: Float[Array, "B G R Q"]  # sum of dt A from the chunk's start to the token
    entering: Float[Array, "B G R Q"]  # from the chunk's incoming state to the token
    leaving: Float[Array, "B G R Q"]  # from the token to the chunk's outgoing state
    whole: Float[Array, "B G R"]  # from the incoming to the outgoing state


def forward(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
    documents: Int[Array, "B T"] | None,
    *,
    chunk: int,
) -> tuple[Float[Array, "B T M P"], Float[Array, "B M P N"]]:
    """y and the final state; `documents` counts document starts since the row's first token."""
    layout = Layout.of(x, B, chunk)
    rate, skip = layout.per_head(A), layout.per_head(D)
    rows = layout.rows(x, dt, B, C, documents)

    def step(carry, index):
        state, y = carry
        tokens = layout.take(rows, index)
        decays = chunk_decays(tokens, rate)
        y = layout.put(y, chunk_outputs(tokens, decays, skip, state), index)
        return (next_state(tokens, decays, state), y), None

    carry = (layout.state_in(state), jnp.zeros_like(rows.x))
    (state, y), _ = jax.lax.scan(step, carry, jnp.arange(layout.chunks))
    return layout.row_out(y, x), layout.state_out(state)


def backward(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
    documents: Int[Array, "B T"] | None,
    dy: Float[Array, "B T M P"],
    dstate: Float[Array, "B M P N"],
    *,
    chunk: int,
) -> tuple[Array, ...]:
    """Cotangents of x, dt, A, B, C, D and the initial state; all else is computed again."""
    layout = Layout.of(x, B, chunk)
    rate, skip = layout.per_head(A), layout.per_head(D)
    rows = layout.rows(x, dt, B, C, documents)
    dy = layout.pad(dy).reshape(rows.x.shape)

    def advance(state, index):
        tokens = layout.take(rows, index)
        return next_state(tokens, chunk_decays(tokens, rate), state), state

    indices = jnp.arange(layout.chunks)
    _, states = jax.lax.scan(advance, layout.state_in(state), indices)

    def step(carry, scanned):
        (dstate, gradients), (index, state) = carry, scanned
        tokens, dy_chunk = layout.take((rows, dy), index)
        decays = chunk_decays(tokens, rate)
        by_token, dA, dD = chunk_gradients(tokens, decays, (rate, skip), dy_chunk, state, dstate)
        dstate = next_cotangent(tokens, decays, dy_chunk, dstate)
        return (dstate, layout.put(gradients, by_token, index)), (dA, dD)

    empty = jax.tree.map(jnp.zeros_like, rows[:4])
    carry = (layout.state_in(dstate), empty)
    (dstate, gradients), heads = jax.lax.scan(step, carry, (indices, states), reverse=True)
    dx, ddt, dB, dC = map(layout.row_out, gradients, (x, dt, B, C))
    dA, dD = (
        jnp.sum(part, axis=(0, 1)).reshape(like.shape).astype(like.dtype)
        for part, like in zip(heads, (A, D), strict=True)
    )
    return dx, ddt, dA, dB, dC, dD, layout.state_out(dstate)


def chunk_decays(tokens: Operands, rate: Float[Array, "G R"]) -> Decays:
    """Decays to and from the ends of a chunk."""
    triangle = jnp.tri(tokens.dt.shape[1], dtype=jnp.float32)
    log = product("bsgr,ts->bgrt", tokens.dt * rate, triangle)
    end = log[..., -1:]
    entering, leaving, whole = log, jnp.minimum(end - log, 0.0), end
    if tokens.documents is not None:
        documents = tokens.documents[:, None, None]
        last = documents[..., -1:]
        entering = jnp.where(documents == 0, entering, -jnp.inf)
        leaving = jnp.where(documents == last, leaving, -jnp.inf)
        whole = jnp.where(last == 0, whole, -jnp.inf)
    return Decays(log, jnp.exp(entering), jnp.exp(leaving), jnp.exp(whole[..., 0]))


def decays_within(
    tokens: Operands, decays: Decays, *, source_first: bool = False
) -> Float[Array, "B G R Q Q"]:
    """exp of the decay from token s to token t >= s of a chunk as [t, s], and 0 for other pairs."""
    keep = jnp.tri(decays.log.shape[-1], dtype=bool)
    if tokens.documents is not None:
        same = tokens.documents[:, :, None] == tokens.documents[:, None, :]
        keep = (keep & same)[:, None, None]
    difference = decays.log[..., :, None] - decays.log[..., None, :]
    if source_first:
        keep, difference = jnp.swapaxes(keep, -1, -2), -difference
    # What is masked would grow without bound. Rounding may leave the sum to t above that to s < t,
    # and no decay is a growth.
    return jnp.exp(jnp.where(keep, jnp.minimum(difference, 0.0), -jnp.inf))


def chunk_outputs(
    tokens: Operands, decays: Decays, skip: Float[Array, "G R"], state: Float[Array, "B G N W"]
) -> Float[Array, "B Q G R P"]:
    """y of a chunk: mixed within it, carried into it, and the skip D x."""
    x, dtype = tokens.x, tokens.x.dtype
    scores = product("btgn,bsgn->bgts", tokens.C, tokens.B)[:, :, None]
    mixing = (scores * decays_within(tokens, decays)).astype(dtype)
    inputs = by_head(x * tokens.dt[..., None]).astype(dtype)
    mixed = product("bgrts,bgrsp->bgrtp", mixing, inputs)
    carried = product("btgn,bgnw->bgtw", tokens.C, state.astype(dtype))
    carried = ungroup(carried, x.shape) * by_token(decays.entering)
    return (by_head(mixed, back=True) + carried + skip[..., None] * x).astype(dtype)


def next_state(
    tokens: Operands, decays: Decays, state: Float[Array, "B G N W"]
) -> Float[Array, "B G N W"]:
    """The state after a chunk."""
    weights = tokens.dt[..., None] * by_token(decays.leaving)
    inputs = group(tokens.x * weights).astype(tokens.x.dtype)
    return spread(decays.whole, state) * state + product("bsgn,bgsw->bgnw", tokens.B, inputs)


def next_cotangent(
    tokens: Operands,
    decays: Decays,
    dy: Float[Array, "B Q G R P"],
    dstate: Float[Array, "B G N W"],
) -> Float[Array, "B G N W"]:
    """The cotangent of the state before a chunk, from that of the state after it."""
    outputs = group(dy * by_token(decays.entering)).astype(dy.dtype)
    return spread(decays.whole, dstate) * dstate + product("btgn,bgtw->bgnw", tokens.C, outputs)


def chunk_gradients(
    tokens: Operands,
    decays: Decays,
    parameters: tuple[Float[Array, "G R"], Float[Array, "G R"]],
    dy: Float[Array, "B Q G R P"],
    state: Float[Array, "B G N W"],
    dstate: Float[Array, "B G N W"],
) -> tuple[tuple[Array, ...], Float[Array, "B G R"], Float[Array, "B G R"]]:
    """Cotangents of a chunk's x, dt, B, C, and its share of those of A and D, the parameters.

    `state` is the one before the chunk, `dstate` the cotangent of the one after it. Pairs of tokens
    stand as [s, t], the source first; u = dt x is what a token adds to the state.
    """
    x, dt = tokens.x, tokens.dt[..., None]
    rate, skip = parameters
    narrow = functools.partial(jnp.asarray, dtype=x.dtype)
    u, dy_heads = narrow(by_head(x * dt)), narrow(by_head(dy))
    within = decays_within(tokens, decays, source_first=True)
    mixing = product("bsgn,btgn->bgst", tokens.B, tokens.C)[:, :, None] * within
    dmixing = product("bgrsp,bgrtp->bgrst", u, dy_heads)
    dscores = narrow(sum_over("r", "bgrst", dmixing * within))

    before, after = narrow(state), narrow(dstate)
    entering, leaving = by_token(decays.entering), by_token(decays.leaving)
    dB = product("bgst,btgn->bsgn", dscores, tokens.C)
    dB += product("bgsw,bgnw->bsgn", narrow(group(x * (dt * leaving))), after)
    dC = product("bgst,bsgn->btgn", dscores, tokens.B)
    dC += product("bgtw,bgnw->btgn", narrow(group(dy * entering)), before)

    du_out = ungroup(product("bsgn,bgnw->bgsw", tokens.B, after), x.shape) * leaving
    du = by_head(product("bgrst,bgrtp->bgrsp", narrow(mixing), dy_heads), back=True) + du_out
    carried = ungroup(product("btgn,bgnw->bgtw", tokens.C, before), x.shape) * entering

    # The diagonal cancels between row and column sums in exact arithmetic only.
    strict = jnp.tri(mixing.shape[-1], k=-1, dtype=bool).T
    pairs = jnp.where(strict, dmixing * mixing, 0.0)
    ends = sum_over("s", "bgrst", pairs) - sum_over("t", "bgrst", pairs) + channel_sum(dy * carried)
    across = decays.whole * state_sum(state * dstate, decays.whole.shape[2])
    dlog = log_gradient(ends, channel_sum(x * dt * du_out), across)
    ddt = channel_sum(x * du) + dlog * rate[..., None]
    dA = jnp.sum(dlog * jnp.moveaxis(tokens.dt, 1, 3), axis=-1)
    dD = jnp.sum(x * dy, axis=(1, 4))
    dx = du * dt + skip[..., None] * dy
    return (narrow(dx), jnp.moveaxis(ddt, 3, 1), dB, dC), dA, dD


def log_gradient(
    ends: Float[Array, "B G R Q"], leaving: Float[Array, "B G R Q"], across: Float[Array, "B G R"]
) -> Float[Array, "B G R Q"]:
    """Cotangent of dt A at each token: all that was carried across it.

    `ends` is what arrives at a token less what leaves it for tokens of the chunk, `leaving` what
    leaves it for the outgoing state, `across` what crosses the whole chunk. The formula dy y - u du
    is shorter, and its terms cancel: with bfloat16 operands no digit of dA is left.
    """
    size = ends.shape[-1]
    inside = product("bgrt,ts->bgrs", ends, jnp.tri(size, dtype=jnp.float32))
    outgoing = product("bgrs,ts->bgrt", leaving, jnp.tri(size, k=-1, dtype=jnp.float32))
    return inside + outgoing + across[..., None]


def by_token(array: Float[Array, "B G R Q"]) -> Float[Array, "B Q G R 1"]:
    """A factor of each token and head, beside the channels of a chunk."""
    return jnp.moveaxis(array, 3, 1)[..., None]


def by_head(array: Float[Array, "B a b c P"], *, back: bool = False) -> Float[Array, "B d e f P"]:
    """[B Q G R P] as [B G R Q P], or back."""
    return jnp.moveaxis(array, 3, 1) if back else jnp.moveaxis(array, 1, 3)


def group(array: Float[Array, "B Q G R P"]) -> Float[Array, "B G Q W"]:
    """The channels of a group side by side."""
    array = jnp.swapaxes(array, 1, 2)
    return array.reshape(*array.shape[:3], -1)


def ungroup(array: Float[Array, "B G Q W"], shape: tuple[int, ...]) -> Float[Array, "B Q G R P"]:
    """The inverse of `group`."""
    batch, _, _, heads, channels = shape
    array = array.reshape(*array.shape[:3], heads, channels)
    return jnp.swapaxes(array, 1, 2)


def spread(factor: Float[Array, "B G R"], like: Float[Array, "B G N W"]) -> Float[Array, "B G 1 W"]:
    """A factor of each head for its channels."""
    return jnp.repeat(factor, like.shape[-1] // factor.shape[-1], axis=-1)[:, :, None]


def sum_over(axis: str, axes: str, array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sum over one axis, as a product with ones: on a CPU up to 10x faster than a reduction."""
    ones = jnp.ones(array.shape[axes.index(axis)], array.dtype)
    return product(f"{axes},{axis}->{axes.replace(axis, '')}", array, ones)


def channel_sum(array: Float[Array, "B Q G R P"]) -> Float[Array, "B G R Q"]:
    """Sum over a head's channels, tokens last."""
    return jnp.moveaxis(sum_over("p", "bqgrp", array), 1, 3)


def state_sum(array: Float[Array, "B G N W"], heads: int) -> Float[Array, "B G R"]:
    """Sum over states and a head's channels; W is all channels of a group."""
    by_channel = array.reshape(*array.shape[:3], heads, -1)
    return jnp.sum(sum_over("p", "bgnrp", by_channel), axis=2)


class Layout(NamedTuple):
    """How the tokens of a row are cut into chunks, and the heads into groups."""

    batch: int
    tokens: int
    groups: int
    group_heads: int
    channels: int
    state_size: int
    chunks: int  # of a row
    size: int  # tokens of a chunk

    @classmethod
    def of(cls, x: Float[Array, "B T M P"], B: Float[Array, "B T G N"], chunk: int) -> "Layout":
        """Chunks of equal size, as few as the longest chunk allows."""
        (batch, tokens, heads, channels), (groups, state_size) = x.shape, B.shape[2:]
        chunks = math.ceil(tokens / min(chunk, max(CHUNK, state_size // 2)))
        size = math.ceil(tokens / chunks)
        return cls(batch, tokens, groups, heads // groups, channels, state_size, chunks, size)

    def per_head(self, array: Float[Array, "M"]) -> Float[Array, "G R"]:
        """A value of each head, float32, heads by group."""
        return array.astype(jnp.float32).reshape(self.groups, self.group_heads)

    def rows(self, x: Array, dt: Array, B: Array, C: Array, documents: Array | None) -> Operands:
        """The operands padded to whole chunks; a token with dt = 0 changes no state."""
        heads = (self.batch, self.chunks * self.size, self.groups, self.group_heads)
        return Operands(
            self.pad(x).reshape(*heads, self.channels),
            self.pad(dt.astype(jnp.float32)).reshape(heads),
            self.pad(B),
            self.pad(C),
            None if documents is None else self.counted(documents),
        )

    def counted(self, documents: Int[Array, "B T"]) -> Int[Array, "B cQ"]:
        """Document starts since the token before the chunk; the row's first token starts none."""
        cut = self.pad(documents, "edge").reshape(self.batch, self.chunks, self.size)
        before = jnp.pad(cut[:, :-1, -1], ((0, 0), (1, 0)))
        return (cut - before[..., None]).reshape(self.batch, -1)

    def pad(self, array: Float[Array, "B T ..."], mode: str = "constant") -> Array:
        """Tokens filled up to whole chunks, as jnp.pad does in that mode."""
        missing = self.chunks * self.size - self.tokens
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, widths, mode=mode) if missing else array

    def row_out(self, rows: Array, like: Array) -> Array:
        """Rows without the padding, in the shape and dtype of `like`."""
        return rows[:, : self.tokens].reshape(like.shape).astype(like.dtype)

    def take(self, rows: Any, index: Int[Array, ""]) -> Any:
        """One chunk of every array."""
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim,
            start_index=index * self.size,
            slice_size=self.size,
            axis=1,
        )
        return jax.tree.map(cut, rows)

    def put(self, rows: Any, chunk: Any, index: Int[Array, ""]) -> Any:
        """Every array with one chunk overwritten."""
        return jax.tree.map(
            lambda row, part: jax.lax.dynamic_update_slice_in_dim(
                row, part.astype(row.dtype), index * self.size, axis=1
            ),
            rows,
            chunk,
        )

    def state_in(self, array: Float[Array, "B M P N"]) -> Float[Array, "B G N W"]:
        """A state as the chunks take it: channels of a group last, float32."""
        array = array.astype(jnp.float32).reshape(self.batch, self.groups, -1, self.state_size)
        return jnp.swapaxes(array, 2, 3)

    def state_out(self, array: Float[Array, "B G N W"]) -> Float[Array, "B M P N"]:
        """A state of the chunks as the op gives it."""
        shape = (self.batch, self.groups * self.group_heads, self.channels, self.state_size)
        return jnp.swapaxes(array, 2, 3).reshape(shape)
