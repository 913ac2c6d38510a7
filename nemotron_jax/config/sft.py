"""How conversations become the rows and the loss of supervised fine-tuning."""

import dataclasses

from nemotron_jax.config.checks import at_least_one, check, counts, not_negative, one_of

LOSSES = ("tokens", "conversations")
BAD_ROWS = ("error", "drop")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Fine-tuning on conversations; `data.sources` name them, `data.source_weights` their shares.

    A source is `messages:FILE`, jsonl or a .json list in messages format, or `oracle:NAME` or
    `oracle:NAME/LEVEL`, the right way through tasks of an environment, or `slips:NAME/LEVEL:SLIP`,
    one of its wrong ways, for a model that is to have something left to learn. Low-effort traces
    are a source of their own whose rows carry `chat_template_kwargs`.

    `loss`: `tokens` is stage one, the mean over all learned tokens of a batch; `conversations` is
    stage two, the mean over conversations of each one's own mean. `bad_rows`: an `error`, or `drop`
    and count them. The two shares below are of the conversations that reason.
    """

    loss: str = "tokens"
    bad_rows: str = "error"
    reasoning_off: float = 0.0  # share whose reasoning is taken away
    truncated_budget: float = 0.0  # share whose reasoning is cut at a random budget, and says so
    oracle_tasks: int = 2000  # tasks of each oracle source
    success_tasks: int = 0  # held-out tasks played at each evaluation; 0 plays none
    success_tokens: int = 64  # new tokens of one turn there

    def __post_init__(self) -> None:
        at_least_one(self, "oracle_tasks", "success_tokens")
        counts(self, "success_tasks")
        one_of(self, "loss", LOSSES)
        one_of(self, "bad_rows", BAD_ROWS)
        not_negative(self, "reasoning_off", "truncated_budget")
        rule = f"and truncated_budget={self.truncated_budget} must add to at most 1"
        check(self, "reasoning_off", self.reasoning_off + self.truncated_budget <= 1, rule)
