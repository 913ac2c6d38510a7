"""The selective scan on TPU: one step of the grid is a chunk of one group of heads.

The grid is [batch, groups, chunks], the chunks in order: forward, the group's state [W, N] stays in
fast memory in float32 from a row's first chunk to its last; backward, its cotangent, from the last
chunk to the first. Nothing else is carried, and nothing but operands and results moves.
Inside a step time lies along the lanes and channels along the sublanes. So the factors of a token
are rows, which broadcast for nothing, a head of 64 channels fills its registers, the sums over
channels are plain additions, and the products with B and C are shared by all heads of the group.
Only the decays between two tokens of a chunk need a factor along the sublanes as well.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.ssd.tpu_layout import (
    CHUNK,
    LANES,
    Interpret,
    Sizes,
    by_channel,
    compiler_params,
    dot,
    exact,
    read_tokens,
    up_to,
)


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
    keep_states: bool = True,
    interpret: Interpret = False,
) -> tuple[tuple[Array, Array], Any]:
    """(y, final state), and what the backward pass wants: operands and each chunk's first state.

    Those states are kept in x's dtype, in which they enter the products; `keep_states=False` leaves
    them out. `documents` counts document starts since the row's first token.
    """
    sizes = Sizes.of(x, B, chunk)
    block = sizes.blocks()
    states = jax.ShapeDtypeStruct((sizes.batch, sizes.chunks, *sizes.states), x.dtype)
    keep = 1 if keep_states else 0
    y, last, *kept = pl.pallas_call(
        functools.partial(_forward_kernel, heads=sizes.tile_heads),
        grid=(sizes.batch, sizes.groups, sizes.chunks),
        in_specs=[
            block.channels, block.heads, block.head, block.shared, block.shared, block.head,
            block.state, block.documents,
        ],
        out_specs=[block.channels, block.state] + [block.states] * keep,
        out_shape=[
            jax.ShapeDtypeStruct((sizes.batch, sizes.padded, sizes.states[0]), x.dtype),
            jax.ShapeDtypeStruct((sizes.batch, *sizes.states), jnp.float32),
        ]
        + [states] * keep,
        scratch_shapes=[pltpu.VMEM((sizes.width, sizes.state_size), jnp.float32)],
        compiler_params=compiler_params(),
        cost_estimate=sizes.cost(x.dtype.itemsize, products=1),
        name="ssd_forward",
        interpret=interpret,
    )(*sizes.operands(x, dt, A, B, C, D, state, documents))  # fmt: skip
    out = sizes.rows_out(y, x), last.reshape(state.shape)
    return out, (x, dt, A, B, C, D, state, documents, *kept)


def outputs(*operands: Any, **options: Any) -> tuple[Array, Array]:
    """`forward` without what a backward pass would want."""
    return forward(*operands, **options, keep_states=False)[0]


def backward(
    residuals: tuple[Any, ...],
    cotangents: tuple[Float[Array, "B T M P"], Float[Array, "B M P N"]],
    *,
    chunk: int,
    interpret: Interpret = False,
) -> tuple[Array | None, ...]:
    """Gradients of the operands, from what `forward` kept; None for `documents`."""
    *operands, states = residuals
    x, dt, A, B, C, D, state, _ = operands
    dy, dlast = cotangents
    sizes = Sizes.of(x, B, chunk)
    block, batch, padded = sizes.blocks(reverse=True), sizes.batch, sizes.padded
    heads = jax.ShapeDtypeStruct((batch, dt.shape[2], padded), jnp.float32)
    sums = jax.ShapeDtypeStruct((batch, dt.shape[2], sizes.chunk), jnp.float32)
    shared = jax.ShapeDtypeStruct((batch, padded, sizes.groups * sizes.state_size), B.dtype)
    *cut, _, documents = sizes.operands(*operands)
    dx, ddt, dA, dB, dC, dD, dfirst = pl.pallas_call(
        functools.partial(_backward_kernel, heads=sizes.tile_heads),
        grid=(batch, sizes.groups, sizes.chunks),
        in_specs=[
            block.channels, block.heads, block.head, block.shared, block.shared, block.head,
            block.documents, block.states, block.channels, block.state,
        ],
        out_specs=[
            block.channels, block.heads, block.sums, block.shared, block.shared, block.sums,
            block.state,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, padded, sizes.states[0]), x.dtype),
            heads, sums, shared, shared, sums,
            jax.ShapeDtypeStruct((batch, *sizes.states), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((sizes.width, sizes.state_size), jnp.float32)],
        compiler_params=compiler_params(),
        cost_estimate=sizes.cost(x.dtype.itemsize, products=2),
        name="ssd_backward",
        interpret=interpret,
    )(*cut, documents, states, sizes.rows(dy), dlast.reshape(batch, *sizes.states))  # fmt: skip
    total = lambda parts, like: jnp.sum(parts, axis=(0, 2)).astype(like.dtype)
    return (
        sizes.rows_out(dx, x),
        sizes.rows_out(jnp.swapaxes(ddt, 1, 2), dt),
        total(dA, A),
        sizes.rows_out(dB, B),
        sizes.rows_out(dC, C),
        total(dD, D),
        dfirst.reshape(state.shape),
        None,
    )


def unsupported(x: Array, dt: Array, A: Array, B: Array, *_: Any, chunk: int) -> str | None:
    """Why these shapes cannot run, or None: they fill whole registers of 128 lanes."""
    (heads, head_dim), (groups, state_size) = x.shape[2:], B.shape[2:]
    if x.dtype not in (jnp.bfloat16, jnp.float32) or B.dtype != x.dtype:
        return f"x is {x.dtype} and B {B.dtype}; the kernel takes bfloat16 or float32 for both"
    if chunk < CHUNK:
        return f"chunk={chunk}; the kernel works on {CHUNK} tokens at a time"
    if state_size % LANES or head_dim % 16 or (LANES % head_dim and head_dim % LANES):
        return (
            f"head_dim={head_dim} and state_size={state_size}; the kernel takes head sizes of 16, "
            f"32, 64 and multiples of {LANES}, and state sizes that are multiples of {LANES}"
        )
    group_heads = heads // groups
    if (group_heads * head_dim) % LANES or (group_heads % 8 and groups > 1):
        return (
            f"{group_heads} heads a group of {head_dim} channels; the kernel takes groups of 8, "
            f"16, ... heads whose channels fill {LANES} lanes"
        )
    return None


def _forward_kernel(
    x_ref,  # [Q, W]
    dt_ref,  # [R, Q] float32
    A_ref,  # [R, 1] float32
    B_ref,  # [Q, N]
    C_ref,  # [Q, N]
    D_ref,  # [R, 1] float32
    first_ref,  # [W, N] float32, the row's initial state
    documents_ref,  # [1, Q] int32, starts since the token before the chunk
    y_ref,  # [Q, W]
    last_ref,  # [W, N] float32, the row's final state
    *refs,  # kept [W, N], the chunk's first state, if wanted; state [W, N] float32, carried
    heads,
):
    *kept_refs, state_ref = refs
    Q, W = x_ref.shape
    P = W // dt_ref.shape[0]
    narrow = functools.partial(jnp.asarray, dtype=x_ref.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    tokens = read_tokens(dt_ref, A_ref, documents_ref)
    B, C = B_ref[...], C_ref[...]
    scores = dot(B, C, 1, 1)  # [s, t]: the source first
    s, t = (lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
    keep = (s <= t) & (tokens.document_down == tokens.document)
    bound = jnp.where(keep, 0.0, -jnp.inf)

    for start in range(0, W // P, heads):
        tile = range(start, start + heads)
        channels = slice(start * P, (start + heads) * P)
        spread = functools.partial(by_channel, heads=tile, channels=P)
        state = state_ref[channels, :]
        for kept_ref in kept_refs:
            kept_ref[channels, :] = narrow(state)
        x = jnp.transpose(x_ref[:, channels]).astype(jnp.float32)  # [w, Q]
        u = x * spread(tokens.dt)
        mixed = []
        for i, h in enumerate(tile):
            difference = tokens.log[h : h + 1] - tokens.log_down[:, h : h + 1]
            mixing = narrow(scores * jnp.exp2(jnp.minimum(difference, bound)))
            mixed.append(dot(narrow(u[i * P : (i + 1) * P]), mixing))
        carried = dot(narrow(state), C, 1, 1) * spread(tokens.entering)
        y = jnp.concatenate(mixed) + carried + x * spread(D_ref[...])
        y_ref[:, channels] = jnp.transpose(narrow(y))
        added = dot(narrow(u * spread(tokens.leaving)), B)
        state_ref[channels, :] = state * spread(tokens.whole) + added

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = state_ref[...]


def _backward_kernel(
    x_ref,  # [Q, W]
    dt_ref,  # [R, Q] float32
    A_ref,  # [R, 1] float32
    B_ref,  # [Q, N]
    C_ref,  # [Q, N]
    D_ref,  # [R, 1] float32
    documents_ref,  # [1, Q] int32, starts since the token before the chunk
    kept_ref,  # [W, N], the chunk's first state
    dy_ref,  # [Q, W]
    dlast_ref,  # [W, N] float32, cotangent of the row's final state
    dx_ref,  # [Q, W]
    ddt_ref,  # [R, Q] float32
    dA_ref,  # [R, Q] float32, summed over the row's chunks
    dB_ref,  # [Q, N]
    dC_ref,  # [Q, N]
    dD_ref,  # [R, Q] float32, summed over the row's chunks
    dfirst_ref,  # [W, N] float32, cotangent of the row's initial state
    dstate_ref,  # [W, N] float32, cotangent of the chunk's last state, carried
    *,
    heads,
):
    """Pairs of tokens stand as [t, s], the source last; u = dt x is what a token adds."""
    Q, W = x_ref.shape
    P = W // dt_ref.shape[0]
    narrow = functools.partial(jnp.asarray, dtype=x_ref.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]
        dA_ref[...] = jnp.zeros_like(dA_ref)
        dD_ref[...] = jnp.zeros_like(dD_ref)

    tokens = read_tokens(dt_ref, A_ref, documents_ref)
    B, C = B_ref[...], C_ref[...]
    scores = dot(C, B, 1, 1)
    t, s = (lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
    bound = jnp.where((s <= t) & (tokens.document_down == tokens.document), 0.0, -jnp.inf)
    ones = jnp.ones((16, Q), x_ref.dtype)
    dscores = jnp.zeros((Q, Q), jnp.float32)
    dB_down = dC_down = jnp.zeros((B.shape[1], Q), jnp.float32)  # [N, Q]
    direct, ends, outgoing, crossing, skipped = [], [], [], [], []  # a row for each head

    for start in range(0, W // P, heads):
        tile = range(start, start + heads)
        channels = slice(start * P, (start + heads) * P)
        spread = functools.partial(by_channel, heads=tile, channels=P)
        dstate, state, dy_across = (
            dstate_ref[channels, :],
            kept_ref[channels, :],
            dy_ref[:, channels],
        )
        x, dy = (jnp.transpose(a).astype(jnp.float32) for a in (x_ref[:, channels], dy_across))
        step, entering, leaving = map(spread, (tokens.dt, tokens.entering, tokens.leaving))
        u, dy_in = x * step, narrow(dy * entering)
        u_out, dlater = narrow(u * leaving), narrow(dstate)
        carried = dot(state, C, 1, 1) * entering
        du_out = dot(dlater, B, 1, 1) * leaving
        dC_down += dot(state, dy_in, 0, 0)
        dB_down += dot(dlater, u_out, 0, 0)
        dstate_ref[channels, :] = dstate * spread(tokens.whole) + dot(dy_in, C)

        du = []
        for i, h in enumerate(tile):
            own = slice(i * P, (i + 1) * P)
            difference = tokens.log_down[:, h : h + 1] - tokens.log[h : h + 1]
            within = jnp.exp2(jnp.minimum(difference, bound))
            # The product runs over the tile's channels: those of its other heads count nothing.
            alone = jnp.concatenate(
                [u[own] if j == i else jnp.zeros_like(u[own]) for j in range(heads)]
            )
            weighted = dot(dy_across, narrow(alone)) * within
            dscores += weighted
            du.append(dot(narrow(dy[own]), narrow(scores * within)))
            # What a token takes in less what it gives away, from the same rounded numbers. The
            # diagonal would cancel between the two in exact arithmetic only.
            pairs = narrow(jnp.where(s < t, weighted * scores, 0))
            ends.append(dot(ones, pairs, 1, 1)[:1] - dot(ones, pairs, 1, 0)[:1])
        du = jnp.concatenate(du) + du_out
        dx_ref[:, channels] = jnp.transpose(narrow(du * step + dy * spread(D_ref[...])))
        for i, h in enumerate(tile):
            own = slice(i * P, (i + 1) * P)
            over = lambda product, own=own: jnp.sum(product[own], axis=0, keepdims=True)
            direct.append(over(x * du))
            ends[h] += over(dy * carried)
            outgoing.append(over(u * du_out))
            crossing.append(over(dstate * state))
            skipped.append(over(x * dy))

    direct, ends, outgoing, crossing, skipped = map(
        jnp.concatenate, (direct, ends, outgoing, crossing, skipped)
    )
    # The log decay of a token acts on all that is carried across it: what arrives from it on, what
    # tokens before it send out of the chunk, and what crosses the chunk.
    before = up_to(Q)
    dlog = exact(ends, jnp.transpose(before)) + exact(
        outgoing, before - jnp.where(s == t, 1.0, 0.0)
    )
    dlog += tokens.whole * jnp.sum(crossing, axis=1, keepdims=True)
    ddt_ref[...] = direct + dlog * A_ref[...]
    dA_ref[...] += dlog * tokens.dt
    dD_ref[...] += skipped
    dscores = narrow(dscores)
    dB_ref[...] = narrow(jnp.transpose(dB_down) + dot(dscores, C, 0, 0))
    dC_ref[...] = narrow(jnp.transpose(dC_down) + dot(dscores, B))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dfirst_ref[...] = dstate_ref[...]
