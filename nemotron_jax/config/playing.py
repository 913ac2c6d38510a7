"""How a model plays tasks of environments, whoever asks it to."""

import dataclasses

from nemotron_jax.config.checks import at_least_one, check, counts, not_negative

# Beyond these float32 has no logits left, or the policy plays at random.
COLDEST, HOTTEST = 0.01, 100.0


@dataclasses.dataclass(frozen=True)
class PlayConfig:
    """Bounds of an episode, and how its turns are written.

    Tokens of an episode are its whole conversation's, the description of its tools included.
    `temperature` 0 is greedy. After `budget` tokens of a turn its reasoning is closed, if it is
    open still; tokens that are put there so are not the model's, and nothing is learned from them.
    """

    max_tokens: int = 96
    max_turn_tokens: int = 32
    max_turns: int = 8
    temperature: float = 1.0
    thinking: bool = False  # whether prompts open the reasoning
    budget: int | None = None  # of each turn's reasoning, in tokens; None does not bound it

    def __post_init__(self) -> None:
        at_least_one(self, "max_tokens", "max_turn_tokens", "max_turns")
        rule = "must be at least 2: a prompt has a token, and a turn another"
        check(self, "max_tokens", self.max_tokens > 1, rule)
        not_negative(self, "temperature")
        within = self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST
        rule = f"must be 0, which is greedy, or lie between {COLDEST} and {HOTTEST}"
        check(self, "temperature", within, rule)
        if self.budget is not None:
            counts(self, "budget")
            rule = "must be None without thinking=True: there is no reasoning to bound"
            check(self, "budget", self.thinking, rule)
