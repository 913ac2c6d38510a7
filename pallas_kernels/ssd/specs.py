"""Named shapes of the scan for tests, benchmarks and tuning, and the edge cases of its contract."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call, and what stands in its rows."""

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    groups: int
    state_size: int
    starts: tuple[tuple[int, ...], ...] = ()  # of each row, the tokens that start a new document
    lengths: tuple[int, ...] | None = None
    initial_state: bool = False
    chunk: int = 128
    largest_step: float = 0.5  # dt is uniform up to it; A lies in [-16, -1]

    def __str__(self) -> str:
        return self.name

    def arrays(self, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Random floating operands by name, as `ssd_scan` takes them; matrices in `dtype`."""
        rng = np.random.default_rng(seed)
        row, heads = (self.batch, self.tokens), (self.heads,)
        shared = (*row, self.groups, self.state_size)
        arrays = {
            "x": rng.standard_normal((*row, self.heads, self.head_dim)).astype(dtype),
            "dt": rng.uniform(1e-3, self.largest_step, (*row, *heads)).astype(np.float32),
            "A": -rng.uniform(1, 16, heads).astype(np.float32),
            "B": rng.standard_normal(shared).astype(dtype),
            "C": rng.standard_normal(shared).astype(dtype),
            "D": rng.standard_normal(heads).astype(np.float32),
        }
        if self.initial_state:
            state = (self.batch, self.heads, self.head_dim, self.state_size)
            arrays["initial_state"] = rng.standard_normal(state).astype(np.float32)
        return arrays

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
    "super": Case("super", 1, 8192, heads=128, head_dim=64, groups=8, state_size=128),
    "nano": Case("nano", 1, 8192, heads=64, head_dim=64, groups=8, state_size=128),
    "bench": Case("bench", 8, 512, heads=8, head_dim=64, groups=2, state_size=64, largest_step=0.1),
    "tiny": Case("tiny", 8, 256, heads=4, head_dim=32, groups=2, state_size=32, largest_step=0.1),
}

SMALL = {"heads": 4, "head_dim": 8, "groups": 2, "state_size": 16}

EDGE_CASES = (
    Case("one token", 2, 1, **SMALL, initial_state=True),
    Case("shorter than a chunk", 2, 13, **SMALL, chunk=16),
    Case("no multiple of the chunk", 2, 71, **SMALL, chunk=16, initial_state=True),
    Case("odd sizes", 1, 37, heads=3, head_dim=5, groups=1, state_size=7, chunk=8),
    Case("a group for each head", 2, 40, heads=3, head_dim=4, groups=3, state_size=6, chunk=16),
    Case("documents inside chunks", 2, 70, **SMALL, chunk=16, starts=((5, 6, 40), (33,))),
    Case(
        "documents at chunk edges",
        *(2, 64),
        **SMALL,
        chunk=16,
        starts=((16, 32), (15, 48, 63)),
        initial_state=True,
    ),
    Case("lengths", 3, 50, **SMALL, chunk=16, lengths=(0, 17, 50), initial_state=True),
    Case(
        "documents and lengths",
        *(3, 66),
        **SMALL,
        chunk=16,
        starts=((9, 60), (1, 2, 3), (32,)),
        lengths=(20, 33, 66),
        initial_state=True,
    ),
)
