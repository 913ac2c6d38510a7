"""How XLA keeps matrices in a TPU's memory."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128  # numbers of an array's last axis that lie side by side; a rest of them is filled up


def lies_turned(matrices: Float[Array, "E K N"]) -> bool:
    """Whether XLA keeps such a parameter with K last, which fills whole lanes where N does not: for
    a kernel that wants N there it would turn all matrices round."""
    return matrices.shape[2] % LANES != 0 and matrices.shape[1] % LANES == 0


def as_it_lies(matrices: Float[Array, "E K N"]) -> tuple[Float[Array, "E _ _"], bool]:
    """The matrices with the axis last that is last in memory, and whether that turned them."""
    turned = lies_turned(matrices)
    return jnp.swapaxes(matrices, 1, 2) if turned else matrices, turned
