"""The recurrence of a few tokens in plain XLA, for decoding one and verifying drafts.

What it moves is the state, in and out once for each token whose state is kept: XLA fuses the rest
into that, so no device has a kernel of its own.
"""

import jax.numpy as jnp
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
