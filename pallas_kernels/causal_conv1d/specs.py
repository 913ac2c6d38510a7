"""Named shapes of the convolution for tests and benchmarks, and the edge cases of its contract."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call, and what stands in its rows."""

    name: str
    batch: int
    tokens: int
    channels: int
    width: int = 4
    starts: tuple[tuple[int, ...], ...] = ()  # of each row, the tokens that start a new document
    lengths: tuple[int, ...] | None = None
    bias: bool = True
    tail: bool = False
    activation: str | None = "silu"

    def __str__(self) -> str:
        return self.name

    def arrays(self, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Random floating operands by name, as `causal_conv1d` takes them; inputs in `dtype`."""
        rng = np.random.default_rng(seed)
        shapes = {
            "x": (self.batch, self.tokens, self.channels),
            "weight": (self.width, self.channels),
            "bias": (self.channels,) if self.bias else None,
            "tail": (self.batch, self.width - 1, self.channels) if self.tail else None,
        }
        dtypes = {"x": dtype, "tail": dtype}
        return {
            name: rng.standard_normal(shape).astype(dtypes.get(name, np.float32))
            for name, shape in shapes.items()
            if shape is not None
        }

    def rows(self) -> dict[str, np.ndarray]:
        """`segment_ids` and `lengths`, if the case has them; ids only tell neighbours apart."""
        rows = {}
        if self.starts:
            ids = np.zeros((self.batch, self.tokens), np.int32)
            for row, starts in enumerate(self.starts):
                for count, token in enumerate(starts, start=1):
                    ids[row, token:] = count % 3  # an id comes back for a later document
            rows["segment_ids"] = ids
        if self.lengths is not None:
            rows["lengths"] = np.asarray(self.lengths, np.int32)
        return rows


SHAPES = {
    "super": Case("super", 1, 8192, channels=10240),
    "nano": Case("nano", 1, 8192, channels=6144),
    "bench": Case("bench", 8, 512, channels=768),
    "tiny": Case("tiny", 8, 256, channels=256),
}

EDGE_CASES = (
    Case("one token", 2, 1, channels=5, tail=True),
    Case("shorter than the taps", 2, 2, channels=5, tail=True),
    Case("one tap", 2, 6, channels=3, width=1, tail=True),
    Case("no bias, no activation", 2, 11, channels=7, bias=False, activation=None),
    Case("seven taps", 2, 20, channels=4, width=7, tail=True, activation=None),
    Case("documents", 2, 12, channels=5, starts=((1, 2, 7), (4, 11)), tail=True),
    Case("lengths", 4, 9, channels=5, lengths=(0, 1, 5, 9), tail=True),
    Case(
        "documents and lengths",
        *(4, 9),
        channels=5,
        starts=((3,), (1,), (4, 6), (2, 8)),
        lengths=(2, 2, 5, 9),
        tail=True,
    ),
)
