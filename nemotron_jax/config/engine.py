"""Sizes of the engine that serves many requests at a time."""

import dataclasses
from collections.abc import Sequence

from nemotron_jax.config.cache import CacheConfig
from nemotron_jax.config.checks import at_least_one, check, is_integer

# More drafts were never worth their cost, and every count compiles a loop of its own.
MOST_DRAFTS = 32
# What `speculative="auto"` chooses among: each compiles a decode loop for every width of the table.
# Seven drafts would give Super 3 % more at 32 rows (docs/performance.md).
AUTO_DRAFTS = (0, 1, 3, 5)
# Rows and tokens of one prefill call: all read about as many tokens, so that those who decode wait
# about as long for either, many short prompts together or a piece of a long one.
PREFILL_SHAPES = ((1, 256), (8, 32))
# Where rows may be as long as the second number, a long prompt is read in larger pieces too: fewer
# passes over weights and over what has been read.
_LONG_SHAPE, _LONG = (1, 1024), 4096


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What an engine holds, and how it shares its time.

    `slots` requests run at a time, each of at most `max_length` tokens, prompt and new ones
    together; `pages` of `page_tokens` tokens hold their keys and values (None: enough for all slots
    at full length; with fewer, requests wait for pages). With `prefix_cache` a prompt that begins
    like an earlier text starts from there; `snapshots` bounds how many beginnings are kept, in
    pages that nobody else wants. `speculative=k` drafts k tokens a round with the MTP block;
    "auto" takes as many as pay by what they cost on this machine and how often they stood so far,
    possibly none. Up to
    `rounds` rounds are decoded between two looks at the queue, one while prompts wait to be read:
    more are faster, and tokens come in larger pieces. With `max_waiting`, `submit` raises QueueFull
    where more would wait. `prefill_shapes` are rows and tokens of one prefill call; those that are
    given by default have pieces of 1,024 tokens beside them from a `max_length` of 4,096 on.
    `cache` gives the formats of what is kept.
    """

    slots: int = 8
    max_length: int = 2048
    pages: int | None = None
    page_tokens: int = 64
    prefix_cache: bool = False
    snapshots: int = 4
    speculative: int | str = 0
    rounds: int = 8
    max_waiting: int | None = None
    prefill_shapes: Sequence[tuple[int, int]] = PREFILL_SHAPES
    cache: CacheConfig = CacheConfig()

    def __post_init__(self) -> None:
        at_least_one(self, "slots", "max_length", "page_tokens", "snapshots", "rounds")
        drafts = self.speculative
        chosen = isinstance(drafts, str) and drafts == "auto"
        ok = chosen or (is_integer(drafts) and 0 <= drafts <= MOST_DRAFTS)
        rule = f"must be an integer from 0 to {MOST_DRAFTS}, of tokens drafted at a time, or 'auto'"
        check(self, "speculative", ok, rule)
        for name in ("pages", "max_waiting"):
            value = getattr(self, name)
            ok = value is None or (is_integer(value) and value >= 1)
            check(self, name, ok, "must be an integer of at least 1, or None")
        shapes = [tuple(shape) for shape in self.prefill_shapes]
        sizes = [size for shape in shapes for size in shape]
        ok = bool(shapes) and all(len(shape) == 2 for shape in shapes)
        ok = ok and all(is_integer(size) and size >= 1 for size in sizes)
        check(self, "prefill_shapes", ok, "must be pairs of rows and tokens, as in ((8, 32),)")
        numbers = ["slots", "max_length", "page_tokens", "snapshots", "rounds"]
        for name in numbers if chosen else [*numbers, "speculative"]:
            object.__setattr__(self, name, int(getattr(self, name)))  # numpy's may overflow
        for name in ("pages", "max_waiting"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        if shapes == list(PREFILL_SHAPES) and self.max_length >= _LONG:
            shapes.append(_LONG_SHAPE)
        kept = sorted((min(int(rows), self.slots), int(tokens)) for rows, tokens in shapes)
        object.__setattr__(self, "prefill_shapes", tuple(kept))

    @property
    def num_pages(self) -> int:
        """Pages of the pool, the one that belongs to nobody not counted."""
        if self.pages is not None:
            return self.pages
        return self.slots * -(-self.max_length // self.page_tokens)

    @property
    def drafts(self) -> tuple[int, ...]:
        """The numbers of drafts that a round may have."""
        return AUTO_DRAFTS if self.speculative == "auto" else (self.speculative,)

    @property
    def most_drafts(self) -> int:
        """The largest of them."""
        return max(self.drafts)

    def capacity(self, drafts: int) -> int:
        """Tokens that one decode call may give a row: a first one, and all drafts accepted."""
        return 1 + self.rounds * (drafts + 1)
