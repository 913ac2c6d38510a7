"""What is kept of a task that was played: its tokens, its turns and what they were worth."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from nemotron_jax.data.chat.events import UNCLOSED_CALL, UNCLOSED_REASONING, ParsedTurn
from nemotron_jax.data.chat.render import ANSWER, CALL, CALL_END, THINK
from nemotron_jax.environments.base import Task, Verdict

# The part of a verdict on an episode whose prompt, turn or reply has no tokens or no text.
UNPLAYED = "unplayed"


@dataclasses.dataclass(frozen=True)
class TurnSpan:
    """The tokens start … stop - 1 of an episode, which the model wrote at one go."""

    start: int
    stop: int
    well_formed: bool
    calls: int
    closed: bool  # by the model itself
    version: int = 0  # optimizer steps behind the weights that wrote it
    unclosed: bool = False  # ended, or cut off, while thinking
    cut_call: bool = False  # not well formed only because a call was cut off


@dataclasses.dataclass(frozen=True)
class Episode:
    """One task played once. `logprobs` are the generator's, 0 where it wrote nothing."""

    task: Task
    group: int  # the same for all episodes of one prompt of a step, and for no others
    tokens: tuple[int, ...]
    logprobs: Float[np.ndarray, "N"]
    turns: tuple[TurnSpan, ...]
    truncated: bool
    verdict: Verdict
    messages: tuple[dict, ...]
    low_effort: bool = False
    forced: tuple[int, ...] = ()  # places of tokens that the budget put there
    paid: float | None = None  # by comparison with the others of its group

    @property
    def reward(self) -> float:
        """What the episode earned: its verdict's reward, unless it was paid by comparison."""
        return self.verdict.reward if self.paid is None else self.paid

    @property
    def own(self) -> Bool[np.ndarray, "N"]:
        """Which tokens the model chose: those of its turns but what its budget put there."""
        mask = np.zeros(len(self.tokens), bool)
        for turn in self.turns:
            mask[turn.start : turn.stop] = True
        mask[list(self.forced)] = False
        return mask

    @property
    def last_tokens(self) -> int:
        """Tokens of its last turn."""
        return self.turns[-1].stop - self.turns[-1].start if self.turns else 0

    @property
    def counted(self) -> bool:
        """Whether its reward means something."""
        return self.verdict.infra_error is None


def turn_span(turn: ParsedTurn, start: int, stop: int, closed: bool, version: int) -> TurnSpan:
    """What is kept of a turn that stands at these tokens."""
    faults = [fault.reason for fault in turn.malformed]
    whole = [fault for fault in turn.malformed if fault.reason != UNCLOSED_CALL]
    well_formed = is_well_formed(turn)
    return TurnSpan(
        start,
        stop,
        well_formed,
        len(turn.calls),
        closed,
        version,
        unclosed=UNCLOSED_REASONING in faults,
        cut_call=not well_formed
        and is_well_formed(dataclasses.replace(turn, malformed=tuple(whole))),
    )


def is_well_formed(turn: ParsedTurn) -> bool:
    """Whether a turn keeps to the chat format, as NeMo RL judges it.

    It does not with a call that cannot be read, a tag of calls anywhere in its text, a tag of
    reasoning in the answer, or one that stands twice in the reasoning. Reasoning that never ends
    breaks nothing: its reward and `overlong` say what it is worth.
    """
    broken = any(fault.reason != UNCLOSED_REASONING for fault in turn.malformed)
    text_tags = any(tag in turn.content for tag in (*_CALL_TAGS, THINK, ANSWER))
    thought_tags = any(tag in turn.reasoning for tag in _CALL_TAGS)
    repeated = any(turn.reasoning.count(tag) > 1 for tag in (THINK, ANSWER))
    return not (broken or text_tags or thought_tags or repeated)


# What a call looks like that is written as text: this family's tags and the usual other ones.
_CALL_TAGS = (CALL, CALL_END, "<function_call>", "</function_call>")
