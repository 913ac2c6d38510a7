"""Who sees whom in attention: positions, lengths and segments, for every implementation."""

import dataclasses

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """A query sees keys at or before its own position, of its own segment if there are segments.

    Query t of row b stands at position offset[b] + t, key s at position s; queries from lengths[b]
    on are padding and see nothing.
    """

    offset: Int[Array, "B"]
    lengths: Int[Array, "B"]
    segment_ids: Int[Array, "B T"] | None
    kv_segment_ids: Int[Array, "B S"] | None
