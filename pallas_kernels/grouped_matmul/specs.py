"""Named shapes of grouped products for tests, benchmarks and tuning, and their edge cases."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of width `width` sorted into groups, and experts of `hidden` columns."""

    name: str
    rows: int
    width: int
    hidden: int
    group_sizes: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def experts(self) -> int:
        """Groups, empty ones counted."""
        return len(self.group_sizes)

    def matmul_arrays(self, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Random operands by name, as `grouped_matmul` takes them."""
        rng = np.random.default_rng(seed)
        return {
            "lhs": rng.standard_normal((self.rows, self.width)).astype(dtype),
            "rhs": rng.standard_normal((self.experts, self.width, self.hidden)).astype(dtype),
            "group_sizes": np.asarray(self.group_sizes, np.int32),
        }

    def mlp_arrays(self, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Random operands by name, as `grouped_mlp` takes them; weights keep the rows' scale."""
        rng = np.random.default_rng(seed)
        up = rng.standard_normal((self.experts, self.width, self.hidden)) * self.width**-0.5
        down = rng.standard_normal((self.experts, self.hidden, self.width)) * self.hidden**-0.5
        return {
            "lhs": rng.standard_normal((self.rows, self.width)).astype(dtype),
            "up": up.astype(dtype),
            "down": down.astype(dtype),
            "group_sizes": np.asarray(self.group_sizes, np.int32),
        }


@dataclasses.dataclass(frozen=True)
class Routing:
    """A routed layer: each token goes to `choices` different relu²-MLPs in the latent."""

    name: str
    tokens: int
    choices: int
    experts: int
    latent: int
    hidden: int

    def __str__(self) -> str:
        return self.name

    def expert_index(self, seed: int = 0) -> np.ndarray:
        """Random different experts for each token, int32 [tokens, choices]."""
        order = np.argsort(np.random.default_rng(seed).random((self.tokens, self.experts)), axis=1)
        return order[:, : self.choices].astype(np.int32)


SHAPES = {
    "super": Routing("super", 8192, choices=22, experts=512, latent=1024, hidden=2688),
    "nano": Routing("nano", 8192, choices=6, experts=128, latent=2688, hidden=1856),
    "bench": Routing("bench", 4096, choices=4, experts=16, latent=128, hidden=128),
    "prefill": Routing("prefill", 512, choices=4, experts=16, latent=128, hidden=128),
    "decode 1": Routing("decode 1", 1, choices=4, experts=16, latent=128, hidden=128),
    "decode 8": Routing("decode 8", 8, choices=4, experts=16, latent=128, hidden=128),
}

EDGE_CASES = (
    Case("one row", 1, 5, 3, (0, 1, 0)),
    Case("first, middle and last groups empty", 37, 24, 40, (0, 10, 0, 27, 0)),
    Case("all rows in one group", 300, 16, 8, (0, 300, 0)),
    Case("rows past the sum", 70, 24, 40, (11, 0, 30)),
    Case("no rows in any group", 20, 8, 8, (0, 0)),
    Case("groups shorter and longer than a tile", 333, 24, 33, (1, 200, 7, 64, 0, 61)),
    Case("more experts than rows", 6, 16, 8, (1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 1)),
    Case("one expert", 50, 8, 24, (43,)),
)
