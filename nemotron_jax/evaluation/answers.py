"""One way to ask a model, in memory or behind a URL: requests in, answers out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: a `prompt` to go on with, as text or token ids, or `messages` of a conversation.

    `temperature` 0 is greedy. `stop`: texts that end the answer and are not part of it.
    `thinking`, `low_effort` and `budget` (of reasoning, in tokens) are the chat template's.
    `prompt_logprobs`: the prompt's own tokens are scored too.
    """

    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    thinking: bool = False
    low_effort: bool = False
    budget: int | None = None
    prompt_logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came. `tokens` counts what the model wrote, reasoning and all.

    `finish_reason`: "stop", "length" (cut off, or no room for a single token) or "error". With
    `error` the machinery failed, and the answer says nothing of the model. `calls` are
    {"name", "arguments"}; `message` is the turn to append to a conversation. `prompt_logprobs` has
    one entry for each prompt token but the first, `prompt_likeliest` whether each was the
    likeliest.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: str = "stop"
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    message: Message = dataclasses.field(default_factory=dict)
    error: str = ""
    prompt_logprobs: tuple[float, ...] = ()
    prompt_likeliest: tuple[bool, ...] = ()


class Answerer(Protocol):
    """Whoever answers."""

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each, in their order; they are worked on together.

        Raises ValueError for what can never be answered, Unavailable for a server that is not
        there.
        """
        ...
