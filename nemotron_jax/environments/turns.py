"""A model's turn as data: text, tool calls, or both."""

import dataclasses
from typing import Any

from nemotron_jax.environments.schema import read_json


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is an object, or the raw text where the model's was not JSON."""

    name: str
    arguments: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a model says at one go.

    With calls, the tools run and their results go back to the model; `text` is then a remark and
    never an answer. Without calls, `text` is what the user reads: the final answer, or a reply in a
    conversation. `reasoning` is the model's own and no verifier reads it for an answer.
    """

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""

    @classmethod
    def of(cls, value: "Turn | str | dict") -> "Turn":
        """The turn that a text, a turn or an assistant message in OpenAI's form stands for.

        A message that a model got wrong becomes a turn with a call that no tool answers to; only a
        value of another type raises, since that is a fault of the caller.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if isinstance(value, dict):
            calls = value.get("tool_calls") or ()
            calls = calls if isinstance(calls, list | tuple) else (calls,)
            return cls(
                text=_text(value.get("content")),
                calls=tuple(_call(call) for call in calls),
                reasoning=_text(value.get("reasoning_content")),
            )
        raise ValueError(
            f"Turn.of: {type(value).__name__} is not a turn; give a Turn, a str or a message dict"
        )

    def message(self) -> dict:
        """The turn as an assistant message, for a chat formatter."""
        message: dict = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


def calling(name: str, text: str = "", /, **arguments: Any) -> Turn:
    """A turn of one tool call."""
    return Turn(text=text, calls=(ToolCall(name, arguments),))


def _call(call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict):
        return ToolCall("", _text(call))
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments)
        except ValueError:
            pass  # kept as text: the tool's answer says that it is not an object
    return ToolCall(_text(call.get("name")), arguments)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
