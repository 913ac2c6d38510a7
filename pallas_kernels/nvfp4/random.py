"""Random bits by a counter: each element's are a hash of two key words and its place.

A generator with a state, or threefry, would cost more than the matrix products whose operands are
rounded. Places are global, so that the same elements get the same bits on every mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

_GOLDEN = 0x9E3779B9
COLUMN = 0x85EBCA6B  # what columns are multiplied by; odd, as the other: no two collide


def key_words(key: Array) -> UInt32[Array, "2"]:
    """Two words of a jax.random key, or of raw words uint32 [2], which are taken as they are."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key).reshape(-1)[-2:].astype(jnp.uint32)
    if key.dtype != jnp.uint32 or key.shape != (2,):
        raise ValueError(
            f"nvfp4: key is {key.dtype} of shape {key.shape}; pass jax.random.key(...) or two "
            "words uint32 [2]"
        )
    return key


def fold(words: UInt32[Array, "2"], number: Array | int) -> UInt32[Array, "2"]:
    """The words of another stream: one for each number."""
    number = jnp.asarray(number).astype(jnp.uint32)
    first = _mix(words[0] ^ _mix(number + jnp.uint32(_GOLDEN)))
    return jnp.stack([first, _mix(words[1] + first)])


def uniform(words: UInt32[Array, "2"], rows: Array, columns: int) -> Float[Array, "rows columns"]:
    """Uniform in [0, 1) in steps of 2**-24, by the global number of each row and by column."""
    column = jnp.arange(columns, dtype=jnp.uint32)[None] * jnp.uint32(COLUMN) + words[1]
    return uniform_of(hashed_rows(words, rows)[:, None], column)


def hashed_rows(words: UInt32[Array, "2"], rows: Array) -> UInt32[Array, "rows"]:
    """A word of each row. Hashed on its own: a sum of two counters would repeat along diagonals."""
    return _mix(rows.astype(jnp.uint32) * jnp.uint32(_GOLDEN) + words[0])


def uniform_of(row: Array, column: Array) -> Float[Array, "rows columns"]:
    """Uniform in [0, 1) from the words of a row and a column, uint32 or int32 of the same bits."""
    bits = jax.lax.shift_right_logical(_mix(row ^ column), jnp.asarray(8, row.dtype))
    return bits.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)


def _mix(word: Array) -> Array:
    """A bijection of 32 bits in which every input bit moves every output bit.

    Source: constants of C. Wellons' hash prospector (lowbias32).
    """
    constant = lambda bits: np.uint32(bits).astype(word.dtype)  # the same bits, if signed
    down = lambda word, by: jax.lax.shift_right_logical(word, jnp.asarray(by, word.dtype))
    word ^= down(word, 16)
    word *= constant(0x7FEB352D)
    word ^= down(word, 15)
    word *= constant(0x846CA68B)
    return word ^ down(word, 16)
