"""The selective state-space recurrence of Mamba-2, one token at a time: the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
) -> tuple[Float[Array, "B T M P"], Float[Array, "B M P N"]]:
    """Outputs and final state of S <- exp(dt A) S + dt x Bᵀ, y = S C + D x, in float32.

    A change of segment id empties S before its token; tokens from lengths[b] on change nothing and
    give y = 0. Source: Mamba-2, arXiv:2405.21060, equation 16 with the skip D x.
    """
    batch, tokens, heads, channels = x.shape
    groups, width = B.shape[2:]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, channels, width), jnp.float32)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, tokens), jnp.int32)
    if lengths is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.concatenate([jnp.zeros((batch, 1), bool), starts], axis=1)
    valid = jnp.arange(tokens) < lengths[:, None]

    def step(S: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_t, dt_t, B_t, C_t, starts_t, valid_t = token
        x_t, dt_t, B_t, C_t = (a.astype(jnp.float32) for a in (x_t, dt_t, B_t, C_t))
        B_t, C_t = (jnp.repeat(a, heads // groups, axis=1) for a in (B_t, C_t))
        starts_t, valid_t = (a[:, None, None, None] for a in (starts_t, valid_t))
        decay = jnp.exp(dt_t * A)[:, :, None, None]
        update = jnp.einsum("bm,bmp,bmn->bmpn", dt_t, x_t, B_t)
        S = jnp.where(valid_t, decay * jnp.where(starts_t, 0.0, S) + update, S)
        y_t = jnp.einsum("bmpn,bmn->bmp", S, C_t) + D[:, None] * x_t
        return S, jnp.where(valid_t[..., 0], y_t, 0.0)

    by_token = [jnp.moveaxis(a, 1, 0) for a in (x, dt, B, C, starts, valid)]
    state, y = jax.lax.scan(step, initial_state.astype(jnp.float32), by_token)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state


def ssd_step(
    x: Float[Array, "B T M P"],
    dt: Float[Array, "B T M"],
    A: Float[Array, "M"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "M"],
    state: Float[Array, "B M P N"],
) -> tuple[Float[Array, "B T M P"], Float[Array, "B T M P N"]]:
    """Outputs of the recurrence and the state after each token."""
    outputs, states = [], []
    for t in range(x.shape[1]):
        token = [array[:, t : t + 1] for array in (x, dt, B, C)]
        y, state = ssd_scan(*token[:2], A, *token[2:], D, initial_state=state)
        outputs.append(y[:, 0])
        states.append(state)
    return jnp.stack(outputs, axis=1), jnp.stack(states, axis=1)
