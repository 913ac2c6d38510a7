"""The selective scan in plain XLA: every row and head at once, one chunk after another.

Inside a chunk tokens mix by matrix products over [B G R]; a float32 state is carried from chunk to
chunk by a scan, and the scan's own derivative, with each chunk computed again, is the gradient. It
is what a device without a kernel of its own gets. Letters beyond those of the op: Q tokens of a
chunk, R heads of a group. Products take operands of x's dtype and accumulate in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

product = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class Chunk(NamedTuple):
    """The operands of one chunk, heads split into groups."""

    x: Float[Array, "B Q G R P"]
    dt: Float[Array, "B Q G R"]
    B: Float[Array, "B Q G N"]
    C: Float[Array, "B Q G N"]
    documents: Int[Array, "B Q"]  # document starts since the row's first token


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
    (batch, tokens, _, channels), groups = x.shape, B.shape[2]
    chunk = min(chunk, tokens)
    documents = jnp.zeros((batch, tokens), jnp.int32) if documents is None else documents
    grouped = lambda a: a.reshape(batch, tokens, groups, -1, *a.shape[3:])
    # A padded token has dt = 0 and the last document's number: it changes no state.
    cut = lambda array: _cut(array, chunk, "constant")
    heads, steps = grouped(x), grouped(dt.astype(jnp.float32))
    rows = Chunk(cut(heads), cut(steps), cut(B), cut(C), _cut(documents, chunk, "edge"))
    rate, skip = (a.astype(jnp.float32).reshape(groups, -1) for a in (A, D))

    @jax.checkpoint
    def step(carry: tuple[Array, Array], part: Chunk) -> tuple[tuple[Array, Array], Array]:
        state, document = carry
        y, state = _chunk(part, rate, skip, state, document)
        return (state, part.documents[:, -1]), y

    grouped_state = (batch, groups, -1, channels, B.shape[3])
    first = (state.astype(jnp.float32).reshape(grouped_state), jnp.zeros((batch,), jnp.int32))
    (last, _), y = jax.lax.scan(step, first, rows)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, *x.shape[2:])[:, :tokens]
    return y, last.reshape(state.shape)


def backward(operands: tuple, cotangents: tuple[Array, Array], *, chunk: int) -> tuple:
    """Cotangents of the operands, from those of y and of the final state."""
    *variables, documents = operands
    scan = functools.partial(forward, documents=documents, chunk=chunk)
    return *jax.vjp(lambda *given: scan(*given), *variables)[1](cotangents), None


def _chunk(
    part: Chunk,
    rate: Float[Array, "G R"],
    skip: Float[Array, "G R"],
    state: Float[Array, "B G R P N"],
    document: Int[Array, "B"],
) -> tuple[Float[Array, "B Q G R P"], Float[Array, "B G R P N"]]:
    """y of a chunk and the state after it; `document` is the number of the token before it."""
    dtype, size = part.x.dtype, part.x.shape[1]
    log = jnp.moveaxis(jnp.cumsum(part.dt * rate, axis=1), 1, 3)
    number = part.documents
    same = number[:, :, None] == number[:, None, :]
    earlier = jnp.tri(size, k=-1, dtype=bool)
    # Masked before exp, which would overflow on later tokens. The diagonal is exactly 1 and has no
    # gradient: left in, it would cancel between row and column sums up to rounding alone.
    difference = _no_growth(log[..., :, None] - log[..., None, :])
    difference = jnp.where((earlier & same)[:, None, None], difference, -jnp.inf)
    within = jnp.exp(jnp.where(jnp.eye(size, dtype=bool), 0.0, difference))

    def decay(kept: Array, exponent: Array) -> Array:
        return jnp.exp(jnp.where(kept, _no_growth(exponent), -jnp.inf))

    began, ends = number == document[:, None], number == number[:, -1:]
    entering = decay(began[:, None, None], log)
    leaving = decay(ends[:, None, None], log[..., -1:] - log)
    whole = decay(began[:, -1, None, None], log[..., -1])

    u = part.x * part.dt[..., None]
    scores = product("btgn,bsgn->bgts", part.C, part.B)[:, :, None]
    mixing = (scores * within).astype(dtype)
    y = product("bgrts,bsgrp->btgrp", mixing, u.astype(dtype))
    carried = product("btgn,bgrpn->btgrp", part.C, state.astype(dtype))
    y += carried * jnp.moveaxis(entering, 3, 1)[..., None] + skip[..., None] * part.x
    weighted = (u * jnp.moveaxis(leaving, 3, 1)[..., None]).astype(dtype)
    added = product("bsgrp,bsgn->bgrpn", weighted, part.B)
    return y.astype(dtype), whole[..., None, None] * state + added


def _no_growth(exponent: Array) -> Array:
    """Rounding may leave a sum of decays above 0. At 0 itself, where no time passes, the derivative
    is 1; that of `jnp.minimum` is a half."""
    return jnp.where(exponent > 0, 0.0, exponent)


def _cut(array: Array, chunk: int, mode: str) -> Array:
    """[B T ...] as [chunks B Q ...], the last chunk filled up."""
    missing = -array.shape[1] % chunk
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, widths, mode=mode)
    array = array.reshape(array.shape[0], -1, chunk, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)
