"""Who sees whom in attention: positions, lengths and segments, for every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """A query sees keys at or before its own position, of its own segment if there are segments.

    Query t of row b stands at position offset[b] + t, key s at position s; queries from lengths[b]
    on are padding and see nothing. Without an offset rows begin at 0, without lengths none ends.
    """

    offset: Int[Array, "B"] | None
    lengths: Int[Array, "B"] | None
    segment_ids: Int[Array, "B T"] | None = None
    kv_segment_ids: Int[Array, "B S"] | None = None

    def filled(self, batch: int, tokens: int) -> "Masks":
        """These masks with an offset (0) and lengths (`tokens`) where none was given."""
        one = lambda value, default: jnp.full(batch, default, jnp.int32) if value is None else value
        offset, lengths = one(self.offset, 0), one(self.lengths, tokens)
        return dataclasses.replace(self, offset=offset, lengths=lengths)

    def taken(self, rows: Int[Array, "R"] | slice) -> "Masks":
        """Some rows, in this order."""
        return jax.tree.map(lambda values: values[rows], self)
