"""Draft tokens from the MTP block, by its own attention cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.model.nemotron import Nemotron


def draft(
    model: Nemotron,
    prompt_tokens: Int[Array, "B T"],
    hidden: Float[Array, "B T D"],
    next_token: Int[Array, "B"],
    count: int,
) -> tuple[Int[Array, "B N"], Float[Array, "B N V"]]:
    """The `count` likeliest tokens after `next_token`, and the float32 logits they were taken from.

    `hidden` are the backbone's states of the prompt and `next_token` its pick. The first pass runs
    the whole prompt, shifted by one; each later one runs a single slot with the fresh draft, the
    previous MTP state in the hidden state's place, and the same cache. Source: vLLM's proposer for
    this family (nemotron_h_mtp).
    """
    batch, length = prompt_tokens.shape
    cache = model.init_mtp_cache(batch, length + count)
    shifted = jnp.concatenate([prompt_tokens[:, 1:], next_token[:, None]], axis=1)
    output = model.mtp_step(hidden, shifted, cache=cache)
    tokens, logits = [], []
    for _ in range(count):
        scores = model.logits(output.hidden[:, -1])
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        tokens.append(token)
        logits.append(scores)
        output = model.mtp_step(output.hidden[:, -1:], token[:, None], cache=output.cache)
    return jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1)
