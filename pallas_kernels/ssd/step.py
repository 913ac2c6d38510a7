"""The recurrence of a few tokens in plain XLA, for decoding one and verifying drafts.

What it moves is the state, in and out once for each token whose state is kept: XLA fuses the rest
into that, so no device has a kernel of its own. To verify drafts, `outputs` reads it once for all
of them, and `replay` reads and writes it once when it is known how many stand.
"""

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float


def step(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
    *,
    every_state: bool,
) -> tuple[Float[Array, "B T M P"], Float[Array, "B T M P N"] | Float[Array, "B M P N"]]:
    """Outputs in x's dtype and the float32 state after each token, or after the last alone."""
    groups = B.shape[2]

    def split(array: Array) -> Array:  # [B T M ...] -> [B T G R ...], with R heads sharing B and C
        return array.reshape(*array.shape[:2], groups, -1, *array.shape[3:]).astype(jnp.float32)

    x_f32, dt = split(x), split(dt)
    decay = jnp.exp(dt * A.reshape(groups, -1))[..., None, None]
    update = (x_f32 * dt[..., None])[..., None] * B.astype(jnp.float32)[:, :, :, None, None, :]
    S = state.reshape(update.shape[0], *update.shape[2:])
    states, outputs = [], []
    for t in range(x.shape[1]):
        S = decay[:, t] * S + update[:, t]
        outputs.append(jnp.einsum("bgrpn,bgn->bgrp", S, C[:, t].astype(jnp.float32)))
        states.append(S.reshape(state.shape))
    y = jnp.stack(outputs, axis=1).reshape(x.shape) + D[:, None] * x.astype(jnp.float32)
    return y.astype(x.dtype), jnp.stack(states, axis=1) if every_state else states[-1]


def outputs(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
) -> Float[Array, "B T M P"]:
    """What `step` gives of a few tokens, in x's dtype, from products with the state before them."""
    (batch, tokens), groups = x.shape[:2], B.shape[2]
    log, x_f32, dt, B, C = (a.astype(jnp.float32) for a in (dt * A, x, dt, B, C))
    dot = lambda *operands: jnp.einsum(*operands, precision=Precision.HIGHEST)
    S = state.astype(jnp.float32).reshape(batch, groups, -1, *state.shape[2:])
    before = dot("bgrpn,btgn->btgrp", S, C).reshape(x.shape)
    # Decay from token s to token t, by sums of their own: differences of sums lose digits.
    time = jnp.arange(tokens)
    later = jnp.where((time[:, None] > time)[..., None], log[:, :, None], 0)  # [B T S M]
    decay = jnp.exp(jnp.cumsum(later, axis=1))
    causal = (time[:, None] >= time)[..., None]
    weights = jnp.repeat(dot("btgn,bsgn->btsg", C, B), x.shape[2] // groups, axis=3)
    weights = jnp.where(causal, weights * decay * dt[:, None], 0)
    y = jnp.exp(jnp.cumsum(log, axis=1))[..., None] * before + D[:, None] * x_f32
    for s in range(tokens):
        y += weights[:, :, s, :, None] * x_f32[:, None, s]
    return y.astype(x.dtype)


def replay(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    state: Float[Array, "B M P N"],
) -> Float[Array, "B M P N"]:
    """The float32 state after the tokens, token by token; one of dt = 0 and x = 0 leaves it."""
    S, repeats = state.astype(jnp.float32), x.shape[2] // B.shape[2]
    B = jnp.repeat(B.astype(jnp.float32), repeats, axis=2)
    update, decay = x.astype(jnp.float32) * dt[..., None], jnp.exp(dt * A)
    for t in range(x.shape[1]):
        S = decay[:, t, :, None, None] * S + update[:, t, ..., None] * B[:, t, :, None]
    return S
