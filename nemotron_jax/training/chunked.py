"""Losses of rows by their logits, of which a chunk of rows' are held at one time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.sharding.vocabulary import Vocabulary
from nemotron_jax.sharding.weights import Cuts, gathered, scattered


@dataclasses.dataclass(frozen=True)
class Chunked:
    """A loss of rows, and how it is computed.

    `loss_of(hidden, head, wanted, given, vocabulary)` gives each row's loss and its gradient by the
    row's logits: of hidden states [n, D], this device's part of the head [D, v], what is `wanted`
    of these rows, and what is `given` for all of them.
    """

    loss_of: Callable[..., tuple[Float[Array, "n"], Float[Array, "n v"]]]
    chunk: int  # rows whose logits are held at one time
    cuts: Cuts = Cuts()  # of the head


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def weighted_loss(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D _"],
    wanted: Any,
    given: Any,
    weights: Float[Array, "N"],
    how: Chunked,
) -> Float[Array, ""]:
    """Sum of weights times the losses of rows, never holding more than [chunk, V] logits; float32.

    Inside `local`, `head` may be this device's part. `wanted` is a pytree of arrays with a row for
    each of `hidden`'s. Differentiable in `hidden` and `head`. Its gradient is made in the same pass
    as the loss, while a chunk's logits are at hand, so that no logits are computed twice; until the
    backward pass asks for it, each device keeps its part of the head's.
    """
    head, vocabulary = gathered(head, how.cuts, hidden.dtype), Vocabulary.of(how.cuts, 1)

    def add(total: Array, part: tuple) -> tuple[Array, None]:
        rows, one, weight = part
        loss, _ = how.loss_of(rows, head, one, given, vocabulary)
        return total + jnp.sum(loss * weight), None

    parts = in_chunks((hidden, wanted, weights), how.chunk)
    return jax.lax.scan(add, jnp.zeros(()), parts)[0]


def _forward(
    hidden: Array, part: Array, wanted: Any, given: Any, weights: Array, how: Chunked
) -> tuple[Array, tuple]:
    head = gathered(part, how.cuts, hidden.dtype)
    matrix, vocabulary = head.astype(hidden.dtype), Vocabulary.of(how.cuts, 1)

    def add(carry: tuple, part: tuple) -> tuple[tuple, Array]:
        total, dhead = carry
        rows, one, weight = part
        loss, dlogits = how.loss_of(rows, head, one, given, vocabulary)
        dlogits = (dlogits * weight[:, None]).astype(hidden.dtype)
        dhead += jnp.einsum("nd,nv->dv", rows, dlogits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(loss * weight), dhead), jnp.einsum("nv,dv->nd", dlogits, matrix)

    start = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32))
    parts = in_chunks((hidden, wanted, weights), how.chunk)
    (total, dhead), dhidden = jax.lax.scan(add, start, parts)
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (dhidden.astype(hidden.dtype), scattered(dhead, how.cuts).astype(part.dtype))


def _backward(how: Chunked, residuals: tuple, cotangent: Array) -> tuple:
    dhidden, dhead = residuals
    # The loss is the same on all devices that share the vocabulary: each is given its share of the
    # cotangent.
    cotangent = Vocabulary.of(how.cuts, 1).sum(cotangent)
    return dhidden * cotangent.astype(dhidden.dtype), dhead * cotangent, None, None, None


weighted_loss.defvjp(_forward, _backward)


def cross_entropy(
    hidden: Array, head: Array, labels: Int[Array, "n"], given: None, vocabulary: Vocabulary
) -> tuple[Float[Array, "n"], Float[Array, "n v"]]:
    """Of each row's label in nats: a loss for `Chunked`."""
    logits = _logits(hidden, head)
    log_total, probabilities = _softmax(logits, vocabulary)
    nll = (log_total - vocabulary.of_tokens(logits, labels))[:, 0]
    return nll, probabilities - vocabulary.is_token(labels, head.shape[1])


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL(teacher || row) of the next token in nats, times the temperature squared: a loss for
    `Chunked`, of teachers' hidden states and with the teacher's head.

    Both are softened by the temperature T; times its square, gradients keep their size, as the
    logits' own fall with 1 / T^2. Source: arXiv:1503.02531, section 2.
    """

    temperature: float

    def __call__(
        self,
        hidden: Array,
        head: Array,
        wanted: Float[Array, "n C"],
        given: Float[Array, "C v"],
        vocabulary: Vocabulary,
    ) -> tuple[Float[Array, "n"], Float[Array, "n v"]]:
        own, teachers = (
            _logits(rows, matrix) / self.temperature
            for rows, matrix in ((hidden, head), (wanted, given))
        )
        (own_total, q), (teachers_total, p) = (
            _softmax(logits, vocabulary) for logits in (own, teachers)
        )
        # Each logarithm by itself: equal ones then differ by exactly 0.
        gap = (teachers - teachers_total) - (own - own_total)
        divergence = vocabulary.sum(jnp.sum(p * gap, axis=-1))
        return self.temperature**2 * divergence, self.temperature * (q - p)


def _logits(rows: Float[Array, "n D"], head: Float[Array, "D v"]) -> Float[Array, "n v"]:
    """float32 logits, of operands in the rows' dtype."""
    matrix = head.astype(rows.dtype)
    return jnp.einsum("nd,dv->nv", rows, matrix, preferred_element_type=jnp.float32)


def _softmax(
    logits: Float[Array, "n v"], vocabulary: Vocabulary
) -> tuple[Float[Array, "n 1"], Float[Array, "n v"]]:
    """The logarithm of each row's sum of exponentials, and this device's part of their softmax."""
    top = vocabulary.max(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - top)
    total = vocabulary.sum(jnp.sum(exponentials, axis=-1, keepdims=True))
    return jnp.log(total) + top, exponentials / total


def in_chunks(rows: Any, chunk: int) -> Any:
    """A pytree's rows in chunks; the last one is filled up with zeros, weights of 0 among them."""
    count = jax.tree.leaves(rows)[0].shape[0]
    chunk = min(chunk, count)
    missing = -count % chunk
    pad = lambda a: jnp.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1))
    return jax.tree.map(lambda a: pad(a).reshape(-1, chunk, *a.shape[1:]), rows)
