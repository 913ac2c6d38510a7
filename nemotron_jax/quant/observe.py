"""What weight matmuls are given: the largest magnitudes of their inputs, for scales of a file."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array

_SEEN: contextvars.ContextVar[list[tuple[str, Array]] | None] = contextvars.ContextVar(
    "seen", default=None
)


@contextlib.contextmanager
def observing() -> Iterator[list[tuple[str, Array]]]:
    """Within it every weight matmul appends its role and its inputs' largest magnitude, float32.

    For a model that is traced within, layers unrolled and nothing rematerialised, on one device:
    the values are those of one trace, in the layers' order.
    """
    seen: list[tuple[str, Array]] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def observed() -> bool:
    """Whether somebody wants to know."""
    return _SEEN.get() is not None


def observe(role: str, x: Array) -> None:
    """Tell what a matmul's inputs are, where somebody wants to know."""
    seen = _SEEN.get()
    if seen is not None:
        seen.append((role, jnp.max(jnp.abs(x)).astype(jnp.float32)))
