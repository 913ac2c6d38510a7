"""Named shapes of attention for tests, benchmarks and tuning, and its edge cases."""

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
    kv_heads: int
    head_dim: int
    keys: int | None = None  # of a cache; None: the tokens are the keys
    starts: tuple[tuple[int, ...], ...] = ()  # of each row, the tokens that start a new segment
    lengths: tuple[int, ...] | None = None
    q_offset: tuple[int, ...] | None = None
    causal: bool = True

    def __str__(self) -> str:
        return self.name

    def arrays(self, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Random q, k and v by name."""
        rng = np.random.default_rng(seed)
        keys = self.tokens if self.keys is None else self.keys
        shape = (self.batch, keys, self.kv_heads, self.head_dim)
        return {
            "q": rng.standard_normal((self.batch, self.tokens, self.heads, self.head_dim)).astype(
                dtype
            ),
            "k": rng.standard_normal(shape).astype(dtype),
            "v": rng.standard_normal(shape).astype(dtype),
        }

    def rows(self) -> dict[str, np.ndarray]:
        """`segment_ids`, `lengths` and `q_offset` as far as the case has them."""
        rows = {}
        if self.starts:
            ids = np.zeros((self.batch, self.tokens), np.int32)
            for row, starts in enumerate(self.starts):
                for start in starts:
                    ids[row, start:] += 1
            rows["segment_ids"] = ids
        if self.lengths is not None:
            rows["lengths"] = np.asarray(self.lengths, np.int32)
        if self.q_offset is not None:
            rows["q_offset"] = np.asarray(self.q_offset, np.int32)
        return rows


SHAPES = {
    "super": Case("super", 1, 8192, heads=32, kv_heads=2, head_dim=128),
    "bench": Case("bench", 8, 512, heads=8, kv_heads=2, head_dim=32),
    "long": Case("long", 1, 8192, heads=8, kv_heads=2, head_dim=32),
    "decode": Case("decode", 1, 1, heads=8, kv_heads=2, head_dim=32, keys=1024, q_offset=(255,)),
}

EDGE_CASES = (
    Case("one token", 2, 1, heads=2, kv_heads=1, head_dim=24),
    Case("as many kv heads as heads", 2, 37, heads=3, kv_heads=3, head_dim=24),
    Case("four heads to a kv head", 2, 150, heads=8, kv_heads=2, head_dim=32),
    Case("one kv head", 1, 129, heads=4, kv_heads=1, head_dim=128),
    Case("whole blocks", 1, 256, heads=2, kv_heads=1, head_dim=24),
    Case("wide and narrow blocks of keys", 1, 700, heads=2, kv_heads=1, head_dim=24),
    Case(
        "segments inside blocks",
        *(2, 150),
        heads=4,
        kv_heads=1,
        head_dim=24,
        starts=((1, 30, 64, 140), (128,)),
    ),
    Case(
        "segments that begin after wide blocks",
        *(1, 1300),
        heads=2,
        kv_heads=1,
        head_dim=24,
        starts=((300, 520, 1100),),
    ),
    Case(
        "lengths",
        *(3, 150),
        heads=4,
        kv_heads=2,
        head_dim=24,
        lengths=(0, 17, 150),
        starts=((20,), (5,), (140,)),
    ),
    Case("lengths of long rows", 2, 700, 2, 1, 24, lengths=(650, 300)),
    Case("every key", 2, 150, heads=4, kv_heads=2, head_dim=24, causal=False),
    Case("every key of longer rows", 1, 40, 2, 1, 24, keys=600, causal=False),
    Case("decoding", 3, 1, 8, 2, 32, keys=300, q_offset=(0, 130, 299)),
    Case("a few tokens in a cache", 2, 5, 8, 2, 24, keys=77, q_offset=(0, 70), lengths=(3, 5)),
    Case("a chunk in a cache", 2, 140, 4, 1, 24, keys=900, q_offset=(0, 700)),
)
