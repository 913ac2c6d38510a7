"""What a layer remembers of rows between calls, and what any such state can do.

A cache is made of these and asks none of them what it is: a new kind of state is one more class.
"""

from collections.abc import Callable
from typing import Protocol, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LayerState(Protocol):
    """A pytree whose arrays have rows first, or rows of which a table tells."""

    @property
    def capacity(self) -> int | None:
        """Tokens that a row has room for; None where states never grow."""
        ...

    @property
    def goes_back(self) -> bool:
        """Whether rows forget their last tokens by their length alone."""
        ...

    def select(self, count: Int[Array, "B"]) -> "LayerState":
        """The state after the first `count` tokens of the last call, which kept every state."""
        ...

    def where(self, rows: Bool[Array, "B"], other: Self) -> Self:
        """The given rows of this state, and the rest of `other`, from which this one came."""
        ...

    def emptied(self, rows: Bool[Array, "B"]) -> Self:
        """The state with the given rows as new."""
        ...

    def rounded(self, like: Self, narrow: Callable[[Array], Array]) -> Self:
        """The state, its recurrent part kept as `like` keeps it: by `narrow` in fewer bits."""
        ...


def chosen(
    rows: Bool[Array, "B"], mine: Float[Array, "B ..."], theirs: Float[Array, "B ..."] | int
) -> Float[Array, "B ..."]:
    """The given rows of one array, and the rest of another."""
    return jnp.where(rows.reshape(-1, *(1,) * (mine.ndim - 1)), mine, theirs)
