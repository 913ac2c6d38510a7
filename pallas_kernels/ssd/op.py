"""The selective state-space scan of Mamba-2: contract, checks, gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.ssd import cpu, pallas_tpu, reference, xla
from pallas_kernels.ssd.step import outputs, replay, step


def _recurrence(x, dt, A, B, C, D, state, documents, *, chunk):
    """The definition under the signature of an implementation; `chunk` means nothing to it."""
    return reference.ssd_scan(x, dt, A, B, C, D, initial_state=state, segment_ids=documents)


def _recurrence_step(*operands, every_state):
    y, states = reference.ssd_step(*operands)
    return y, states if every_state else states[:, -1]


def _cpu_gradients(operands, cotangents, *, chunk):
    return *cpu.backward(*operands, *cotangents, chunk=chunk), None


# Operands: (x, dt, A, B, C, D, state, documents), where documents is None or counts the document
# starts along each row; results are (y, state).
SCAN = dispatch.Op(
    "ssd_scan",
    {
        "reference": dispatch.Implementation(*dispatch.autodiff(_recurrence)),
        "xla": dispatch.Implementation(dispatch.keeping_operands(xla.forward), xla.backward),
        "cpu": dispatch.Implementation(
            dispatch.keeping_operands(cpu.forward), _cpu_gradients, platforms=("cpu",)
        ),
        "pallas_tpu": dispatch.Implementation(
            pallas_tpu.forward,
            pallas_tpu.backward,
            pallas_tpu.unsupported,
            platforms=("tpu",),
            outputs=pallas_tpu.outputs,
        ),
    },
)

# Operands: (x, dt, A, B, C, D, state); results are (y, the state after each token or the last).
STEP = dispatch.Op(
    "ssd_step",
    {
        "reference": dispatch.Implementation(*dispatch.autodiff(_recurrence_step)),
        "xla": dispatch.Implementation(*dispatch.autodiff(step)),
    },
)


def ssd_scan(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    *,
    initial_state: Float[Array, "B M P N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    chunk: int = 128,
    implementation: str | None = None,
    target: str | None = None,
) -> tuple[Float[Array, "B T M P"], Float[Array, "B M P N"]]:
    """Outputs y in x's dtype and the float32 state after the last token.

    S <- exp(dt A) S + dt x Bᵀ and y = S C + D x at each token, for every head; the heads of a group
    share B and C. `dt` is the step after softplus, `A` is negative. A change of segment id empties
    S, and `initial_state` belongs to the document of the first token. Tokens at or past `lengths`
    give y = 0, leave the state as it is and receive no gradient. `chunk` is the longest piece of a
    row that is computed by matrix products; it changes rounding alone.
    Decays and states are float32; matrix products take operands of x's dtype.
    `target` is the platform that the program is compiled for, where the caller knows it.
    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    Source: Mamba-2, arXiv:2405.21060, sections 6 and 7.
    """
    _check("ssd_scan", x, dt, A, B, C, D, initial_state, segment_ids, lengths)
    if chunk < 1:
        raise ValueError(f"ssd_scan: chunk={chunk} must be at least 1 token")
    state = _initial(x, B) if initial_state is None else initial_state.astype(jnp.float32)
    documents, valid = _documents(segment_ids, lengths), _valid(x, lengths)
    if valid is not None:
        dt = jnp.where(valid[..., None], dt, 0)  # no step: neither decay nor input
    y, state = SCAN(
        *(x, dt, A, B, C, D, state, documents),
        implementation=implementation,
        target=target,
        chunk=chunk,
    )
    return y if valid is None else jnp.where(valid[..., None, None], y, 0), state


def ssd_step(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
    *,
    lengths: Int[Array, "B"] | None = None,
    every_state: bool = True,
    implementation: str | None = None,
    target: str | None = None,
) -> tuple[Float[Array, "B T M P"], Float[Array, "B T M P N"] | Float[Array, "B M P N"]]:
    """Outputs of a few tokens and the float32 state after each, or after the last alone.

    The recurrence of `ssd_scan` token by token, for decoding one token or verifying a few drafts.
    Without `every_state` the states in between are not kept. Tokens at or past `lengths` give y = 0
    and repeat the state before them. Raises ValueError for shapes that disagree and for an
    implementation that cannot run.
    """
    _check("ssd_step", x, dt, A, B, C, D, state, None, lengths)
    valid = _valid(x, lengths)
    if valid is not None:
        dt = jnp.where(valid[..., None], dt, 0)
    y, states = STEP(
        *(x, dt, A, B, C, D, state.astype(jnp.float32)),
        implementation=implementation,
        target=target,
        every_state=every_state,
    )
    return y if valid is None else jnp.where(valid[..., None, None], y, 0), states


def ssd_outputs(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
) -> Float[Array, "B T M P"]:
    """What `ssd_step` gives of a few tokens, without any state: the one before is read once.

    `ssd_replay` makes the state after as many of them as stand. Raises ValueError for shapes that
    disagree.
    """
    _check("ssd_outputs", x, dt, A, B, C, D, state, None, None)
    return outputs(x, dt, A, B, C, D, state)


def ssd_replay(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    state: Float[Array, "B M P N"],
    *,
    lengths: Int[Array, "B"],
) -> Float[Array, "B M P N"]:
    """The float32 state after the first `lengths` of a few tokens, which are the same operations
    as those of `ssd_step`; a length of 0 leaves the state. Raises ValueError for shapes that
    disagree."""
    _check("ssd_replay", x, dt, A, B, B, A, state, None, lengths)
    valid = _valid(x, lengths)[..., None]  # what stands past a length may be anything, NaN too
    x, dt, B = (jnp.where(valid[..., None] if a.ndim > 3 else valid, a, 0) for a in (x, dt, B))
    return replay(x, dt, A, B, state)


def ssd_state(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B M P N"]]:
    """What a shard of a row does to the state: (decay, state), both float32.

    The state after the shard is `decay * state_before + state`; decay is 0 once a document starts
    inside. Summaries compose: (d1, s1) then (d2, s2) is (d2 d1, d2 s1 + s2). Whether a document
    starts at the shard's own first token is for the caller, who knows the token before it.
    Raises ValueError for shapes that disagree.
    """
    _check("ssd_state", x, dt, A, B, B, A, None, segment_ids, lengths)
    (batch, tokens, heads, head_dim), (groups, state_size) = x.shape, B.shape[2:]
    documents, valid = _documents(segment_ids, lengths), _valid(x, lengths)
    if valid is not None:
        dt = jnp.where(valid[..., None], dt, 0)
    log = dt.astype(jnp.float32) * A
    # Sums over later tokens alone, each its own: a difference of sums from the start loses digits.
    later = jax.lax.cumsum(log, axis=1, reverse=True)
    whole, leaving = later[:, 0], jnp.pad(later[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if documents is not None:
        last = documents[:, -1:]
        leaving = jnp.where((documents == last)[..., None], leaving, -jnp.inf)
        whole = jnp.where(last == 0, whole, -jnp.inf)
    weighted = (x * (dt * jnp.exp(leaving))[..., None]).astype(x.dtype)
    weighted = weighted.reshape(batch, tokens, groups, heads // groups, head_dim)
    state = xla.product("btgrp,btgn->bgrpn", weighted, B)
    return jnp.exp(whole), state.reshape(batch, heads, head_dim, state_size)


def _initial(x: Array, B: Array) -> Float[Array, "B M P N"]:
    batch, _, heads, head_dim = x.shape
    return jnp.zeros((batch, heads, head_dim, B.shape[-1]), jnp.float32)


def _valid(x: Array, lengths: Array | None) -> Array | None:
    return None if lengths is None else jnp.arange(x.shape[1]) < lengths[:, None]


def _documents(segment_ids: Array | None, lengths: Array | None) -> Int[Array, "B T"] | None:
    """How many documents have started since the row's first token; padding starts none."""
    if segment_ids is None:
        return None
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    if lengths is not None:
        starts &= jnp.arange(1, segment_ids.shape[1]) < lengths[:, None]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _check(op: str, x, dt, A, B, C, D, state, segment_ids, lengths) -> None:
    """Shapes agree, heads divide into groups, and there is at least one token."""
    sizes: dict[str, int] = {}
    dispatch.expect_shape(
        op,
        sizes,
        x=(x, "B T M P"),
        dt=(dt, "B T M"),
        A=(A, "M"),
        B=(B, "B T G N"),
        C=(C, "B T G N"),
        D=(D, "M"),
    )
    optional = {
        "initial_state": (state, "B M P N"),
        "segment_ids": (segment_ids, "B T"),
        "lengths": (lengths, "B"),
    }
    given = {name: pair for name, pair in optional.items() if pair[0] is not None}
    dispatch.expect_shape(op, sizes, **given)
    if sizes["M"] % sizes["G"]:
        raise ValueError(
            f"{op}: M={sizes['M']} heads do not divide into G={sizes['G']} groups of B and C"
        )
    if sizes["T"] < 1:
        raise ValueError(f"{op}: x has shape {x.shape}; a row needs at least one token")
