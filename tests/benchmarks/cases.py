"""What is measured: one case is one fresh process of each side. Plain Python, read by both."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement; `kind` is train, prefill or decode.

    Repetitions are timed one by one after `warm_up` runs that are not. A decode repetition times
    `new_tokens` greedy tokens of every row, and not the prompt of `length` tokens before them.
    """

    name: str
    kind: str
    batch: int
    length: int
    repetitions: int
    warm_up: int = 1
    new_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that one repetition is paid for."""
        return self.batch * (self.new_tokens if self.kind == "decode" else self.length)


CASES = {
    case.name: case
    for case in (
        Case("train_8x512", "train", batch=8, length=512, repetitions=3),
        Case("train_1x512", "train", batch=1, length=512, repetitions=5),
        Case("train_1x8192", "train", batch=1, length=8192, repetitions=1),
        Case("prefill_1x512", "prefill", batch=1, length=512, repetitions=8),
        Case("prefill_1x2048", "prefill", batch=1, length=2048, repetitions=4),
        Case("prefill_1x8192", "prefill", batch=1, length=8192, repetitions=2),
        Case("prefill_1x32768", "prefill", batch=1, length=32768, repetitions=1),
        Case("decode_1x64", "decode", batch=1, length=128, new_tokens=64, repetitions=5),
        Case("decode_8x64", "decode", batch=8, length=128, new_tokens=64, repetitions=5),
        # How a token's cost grows with what came before it.
        *(
            Case(f"decode_1x64_at_{length}", "decode", 1, length, new_tokens=64, repetitions=2)
            for length in (1024, 4096, 16384, 65536)
        ),
    )
}
DEFAULT_CASES = ("train_8x512", "prefill_1x512", "prefill_1x32768", "decode_1x64", "decode_8x64")
SCALING_LENGTHS = (2048, 8192, 32768)  # of the prefill cases that show what grows with the prompt


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the ratio of ours to the peer's should reach."""

    speed: float | None = None  # at least
    memory: float | None = None  # at most, of the peak memory


GOALS = {
    "train_8x512": Goal(speed=1.5, memory=1.0),
    "prefill_1x512": Goal(speed=1.3),
    "prefill_1x32768": Goal(speed=1.5, memory=0.5),
    "decode_1x64": Goal(speed=4.0),
    "decode_8x64": Goal(speed=3.0),
}
REMAT_GOALS = {"train_8x512": Goal(speed=1.1, memory=0.5)}  # where activations are recomputed


def goal_of(case: Case, execution: str) -> Goal:
    """The goal of a case run in a way such as `remat=full`; empty where none is set."""
    rematerialised = "remat=" in execution and "remat=none" not in execution
    return (REMAT_GOALS if rematerialised else GOALS).get(case.name, Goal())


def case_from_json(value: dict[str, Any]) -> Case:
    """The case that `dataclasses.asdict` made the value from."""
    return Case(**value)
