"""The formats in which an engine keeps what its rows remember."""

import dataclasses

from nemotron_jax.config.checks import one_of

KV_FORMATS = ("auto", "float32", "bfloat16", "float8_e4m3fn")
STATE_FORMATS = ("float32", "float16", "float16_nearest")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Number formats of keys and values, and of the SSM states.

    `kv`: `auto` is the dtype of the model's matrices; `float8_e4m3fn` has no scale, and clips at
    448. `states`: `float16` is rounded stochastically, to either neighbour in proportion to
    nearness, so that what a state's recurrence sums up is right on average; `float16_nearest`
    drifts, and is here to be compared with. Products and sums are float32 whatever is kept.
    """

    kv: str = "auto"
    states: str = "float32"

    def __post_init__(self) -> None:
        one_of(self, "kv", KV_FORMATS)
        one_of(self, "states", STATE_FORMATS)
