"""How far two ways of computing the same tokens' logits are apart, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nemotron_jax.config.execution import Execution
from nemotron_jax.model.nemotron import Nemotron

CHUNK = 512  # tokens whose logits of both are held at one time


def divergence(
    first: tuple[Nemotron, Float[Array, "B T D"]],
    second: tuple[Nemotron, Float[Array, "B T D"]],
    *,
    execution: Execution = Execution(),
    chunk: int = CHUNK,
) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """KL(first || second) of the next token in nats, and whether both hold the same one likeliest.

    Each is a model and its hidden states; `execution` is how the second's head runs. Never holds
    the logits of more than `chunk` tokens.
    """
    rows, width = first[1].shape[:2]
    flat = [hidden.reshape(rows * width, -1) for _, hidden in (first, second)]
    kl, same = [], []
    for start in range(0, rows * width, chunk):
        parts = [_filled(hidden[start : start + chunk], chunk) for hidden in flat]
        found = _divergence((first[0], parts[0]), (second[0], parts[1]), execution=execution)
        kl.append(np.asarray(found[0]))
        same.append(np.asarray(found[1]))
    shaped = lambda parts: np.concatenate(parts)[: rows * width].reshape(rows, width)
    return shaped(kl), shaped(same)


def _filled(hidden: Float[Array, "n D"], count: int) -> Float[Array, "count D"]:
    """Rows of zeros at the end: one shape, one program."""
    return jnp.pad(hidden, ((0, count - len(hidden)), (0, 0)))


@functools.partial(jax.jit, static_argnames="execution")
def _divergence(
    first: tuple[Nemotron, Array], second: tuple[Nemotron, Array], *, execution: Execution
) -> tuple[Array, Array]:
    logits = first[0].logits(first[1])
    p = jax.nn.log_softmax(logits)
    other = second[0].logits(second[1], execution=execution)
    q = jax.nn.log_softmax(other)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return jnp.maximum(kl, 0.0), jnp.argmax(logits, axis=-1) == jnp.argmax(other, axis=-1)
