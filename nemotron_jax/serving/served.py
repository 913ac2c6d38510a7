"""What is served: names, sizes and defaults that every request is read by."""

import dataclasses

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.wanted import MOST_STOP_TOKENS


@dataclasses.dataclass(frozen=True)
class Served:
    """A model as clients see it. `context` bounds a prompt and its continuation together. Sampling
    that a request leaves open is the checkpoint's."""

    name: str
    tokenizer: Tokenizer
    vocabulary: int
    context: int
    stop_tokens: tuple[int, ...]  # that end a text
    turn_stops: tuple[int, ...]  # that end a turn of a chat
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("stop_tokens", "turn_stops"):
            kept = tuple(dict.fromkeys(getattr(self, name)))[:MOST_STOP_TOKENS]
            object.__setattr__(self, name, kept)
        # A text of more bytes than the longest tokens could hold need not be encoded to be refused.
        longest = int(self.tokenizer.byte_lengths.max())
        object.__setattr__(self, "most_bytes", longest * self.context)

    most_bytes: int = dataclasses.field(init=False, default=0)
