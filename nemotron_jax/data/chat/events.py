"""What an assistant's turn is made of: the events of reading it, and the turn they add up to."""

import dataclasses
from collections.abc import Sequence
from typing import Any

# Why a turn that stops before its end is malformed: what it was in the middle of.
UNCLOSED_REASONING, UNCLOSED_CALL = "the reasoning is not closed", "the call is not closed"


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """More text of the turn's thinking."""

    text: str


@dataclasses.dataclass(frozen=True)
class Content:
    """More text for the reader."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallStarted:
    """A call to `name` begins; `index` counts the turn's calls from 0, malformed ones too."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments as JSON text; all of a finished call's join to one object."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class CallEnded:
    """A whole call, its arguments read by the tool's schema."""

    index: int
    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """What breaks the format: `text` as written, from `<tool_call>` on, and why it counts as none.

    Reasoning that is never closed has been given as Reasoning already; its `text` is empty.
    """

    text: str
    reason: str


@dataclasses.dataclass(frozen=True)
class TurnEnded:
    """The model closed its turn; what it writes after is not read."""


Event = Reasoning | Content | CallStarted | CallArguments | CallEnded | Malformed | TurnEnded


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """A turn as a whole. `closed`: the model ended it itself."""

    reasoning: str
    content: str
    calls: tuple[CallEnded, ...]
    malformed: tuple[Malformed, ...]
    closed: bool

    def message(self) -> dict[str, Any]:
        """The turn in messages format; calls that are malformed are left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message


def turn_of(events: Sequence[Event]) -> ParsedTurn:
    """The turn that all events of a parser add up to."""
    texts = lambda kind: "".join(event.text for event in events if isinstance(event, kind))
    kept = lambda kind: tuple(event for event in events if isinstance(event, kind))
    closed = any(isinstance(event, TurnEnded) for event in events)
    return ParsedTurn(texts(Reasoning), texts(Content), kept(CallEnded), kept(Malformed), closed)


def joined(events: Sequence[Event]) -> list[Event]:
    """The events with neighbouring texts of one kind made one: what no cut of a stream changes."""
    runs: list[list[Event]] = []
    for event in events:
        if runs and _continues(runs[-1][-1], event):
            runs[-1].append(event)
        else:
            runs.append([event])
    return [
        dataclasses.replace(run[0], text="".join(e.text for e in run)) if len(run) > 1 else run[0]
        for run in runs
    ]


def _continues(before: Event, event: Event) -> bool:
    if type(before) is not type(event) or not isinstance(
        event, Reasoning | Content | CallArguments
    ):
        return False
    return not isinstance(event, CallArguments) or before.index == event.index
