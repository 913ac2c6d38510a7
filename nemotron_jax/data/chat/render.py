"""Conversations as the text of the family's chat template, in pieces that say what each is.

Source: the training template of Nemotron 3 Nano, which Super shares, and Super's effort marker;
tests/golden/chat/renders.json holds what that template gives.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemotron_jax.data.chat.schemas import strict_json
from nemotron_jax.data.chat.tools import describe_tools, in_json

Message = Mapping[str, Any]

TURN, END = "<|im_start|>", "<|im_end|>"
THINK, ANSWER = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
REASONS = THINK + "\n"  # how a turn with reasoning opens, and what a generation prompt ends in
ANSWERS = THINK + ANSWER  # how a turn without reasoning opens

# The whitespace that the template's `trim` takes off is Python's.


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """The template's own switches, under the names that `chat_template_kwargs` give them.

    `low_effort` is Super's, `medium_effort` Ultra's; both write a marker after the last user text.
    A `reasoning_budget` writes how many tokens of thinking are allowed; it cuts nothing.
    """

    enable_thinking: bool = True  # whether the generation prompt opens the reasoning
    truncate_history_thinking: bool = True  # reasoning before the last user turn is left out
    reasoning_budget: int | None = None
    low_effort: bool = False
    medium_effort: bool = False

    def __post_init__(self) -> None:
        budget = self.reasoning_budget
        if budget is not None and (type(budget) is not int or budget < 0):
            raise ValueError(
                f"ChatOptions.reasoning_budget={budget!r}: must be None or a number of tokens "
                "from 0 on"
            )
        if self.low_effort and self.medium_effort:
            raise ValueError(
                "ChatOptions.medium_effort=True: low_effort is set too; ask for one effort"
            )

    @classmethod
    def from_kwargs(cls, values: Mapping[str, Any]) -> "ChatOptions":
        """The options of a request's or a row's `chat_template_kwargs`; ValueError for others."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                name = " ".join(name.split())
                raise ValueError(
                    f"chat_template_kwargs.{name:.40}: unknown; the template has {', '.join(known)}"
                )
            if name != "reasoning_budget" and not isinstance(values[name], bool):
                raise ValueError(
                    f"chat_template_kwargs.{name}={values[name]!r:.40}: must be true or false"
                )
        return cls(**values)

    @property
    def note(self) -> str:
        """What is written after the last user text."""
        parts = []
        if self.low_effort:
            parts.append("{reasoning effort: low}")
        if self.medium_effort:
            parts.append("{reasoning effort: efficient}")
        if self.reasoning_budget is not None:
            parts.append(f"{{thinking token budget: {self.reasoning_budget}}}")
        return "".join(f"\n\n{part}" for part in parts)


DEFAULT = ChatOptions()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of the rendered text.

    `markup` is text that the template writes, in which names of reserved tokens are those tokens;
    elsewhere they are the characters they look like. `turn` is the index of the assistant message
    that a piece's tokens are the model's own words of; None for everything the model only reads,
    a turn's opening included, since a generation prompt gives it.
    """

    text: str
    markup: bool = False
    turn: int | None = None


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ChatOptions = DEFAULT,
    *,
    generation_prompt: bool = False,
) -> str:
    """The text of a conversation in messages format, with or without an opening for the next turn.

    A message has `role` and `content`; an assistant's may have `reasoning_content` and
    `tool_calls`. Arguments of calls may be JSON text, as in OpenAI's format. Raises ValueError for
    an empty conversation and for content that is not text.
    """
    return "".join(p.text for p in pieces(messages, tools, options, generation_prompt))


def pieces(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ChatOptions = DEFAULT,
    generation_prompt: bool = False,
) -> list[Piece]:
    """`render` in pieces; joined, their texts are the rendered text."""
    if not messages:
        raise ValueError("chat: messages is empty; give at least one message")
    rest, system = list(enumerate(messages)), ""
    if messages[0]["role"] == "system":
        system = text_of(messages[0])
        rest = rest[1:]
    users = [index for index, message in rest if message["role"] == "user"]
    last_user = users[-1] if users else -1
    out = [Piece(f"{TURN}system\n", markup=True), Piece(system)]
    out += [Piece("\n\n")] if tools and system else []
    out += [Piece(text, markup) for text, markup in describe_tools(tools)] if tools else []
    out.append(Piece(f"{END}\n", markup=True))
    for place, (index, message) in enumerate(rest):
        role = message["role"]
        if role == "assistant":
            past = options.truncate_history_thinking and index < last_user
            out += _assistant(message, index, past)
        elif role == "tool":
            before = rest[place - 1][1]["role"] if place else None
            after = rest[place + 1][1]["role"] if place + 1 < len(rest) else None
            out += _tool_reply(message, opens=before != "tool", closes=after != "tool")
        else:
            note = options.note if index == last_user else ""
            out.append(Piece(f"{TURN}{role}\n", markup=True))
            out += [Piece(text_of(message)), Piece(note), Piece(f"{END}\n", markup=True)]
    if generation_prompt:
        opening = REASONS if options.enable_thinking else ANSWERS
        out.append(Piece(f"{TURN}assistant\n{opening}", markup=True))
    return [piece for piece in out if piece.text]


def text_of(message: Message) -> str:
    """The text of a message's content: a string, or a list of text parts, which are joined."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        texts = [p.get("text") if _is_text_part(p) else None for p in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise ValueError(
        f"chat: content={content!r:.80} of a {message.get('role')!r} message is neither text nor a "
        "list of text parts; the model reads text alone"
    )


def _is_text_part(part: Any) -> bool:
    kinds = ("text", "input_text", "output_text")
    return isinstance(part, Mapping) and part.get("type", "text") in kinds


def calls_of(message: Message) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and arguments of each call of an assistant message."""
    calls = message.get("tool_calls") or ()
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            function = {}  # refused below
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = strict_json(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"chat: the arguments of a call to {function.get('name')!r:.40} are not JSON "
                    f"({error}); write an object"
                ) from None
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"chat: call {call!r:.80} needs a name and an object of arguments; write "
                '{"function": {"name": ..., "arguments": {...}}}'
            )
        yield function["name"], arguments


def _assistant(message: Message, index: int, past: bool) -> list[Piece]:
    """A turn; of a past one only what follows its reasoning."""
    content, calls = text_of(message), list(calls_of(message))
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        content = f"{REASONS}{reasoning}\n{ANSWER}\n{content}"
    elif THINK not in content and ANSWER not in content:
        content = ANSWERS + content
    if past and calls:
        # With calls the rest is trimmed before its empty reasoning goes in front, without after.
        rest = content.split(ANSWER)[-1] if ANSWER in content else content.split(THINK)[0]
        content = ANSWERS + rest.strip()
    elif past and THINK in content and ANSWER in content:
        content = ANSWERS + content.split(ANSWER)[-1]
    content = content.strip()
    out = [Piece(f"{TURN}assistant\n", markup=True)]
    opening = next((o for o in (REASONS, ANSWERS) if content.startswith(o)), "")
    out += [Piece(opening, markup=True), *_own_text(content[len(opening) :], index)]
    if calls:
        out.append(Piece("\n", turn=index))
    for name, arguments in calls:
        out.append(Piece(f"{CALL}\n", markup=True, turn=index))
        out.append(Piece(f"<function={name}>\n", turn=index))
        for key, value in arguments.items():
            value = in_json(value) if isinstance(value, list | tuple | Mapping) else str(value)
            out.append(Piece(f"<parameter={key}>\n{value}\n</parameter>\n", turn=index))
        out.append(Piece("</function>\n", turn=index))
        out.append(Piece(f"{CALL_END}\n", markup=True, turn=index))
    return [*out, Piece(END, markup=True, turn=index), Piece("\n")]


def _own_text(text: str, index: int) -> Iterator[Piece]:
    """An assistant's text: the tags of its reasoning are tokens, as where the model writes them."""
    while tags := [tag for tag in (THINK, ANSWER) if tag in text]:
        tag = min(tags, key=text.index)
        before, text = text.split(tag, 1)
        yield Piece(before, turn=index)
        yield Piece(tag, markup=True, turn=index)
    yield Piece(text, turn=index)


def _tool_reply(message: Message, *, opens: bool, closes: bool) -> list[Piece]:
    out = [Piece(f"{TURN}user\n", markup=True)] if opens else []
    out += [Piece("<tool_response>\n"), Piece(text_of(message)), Piece("\n</tool_response>\n")]
    return [*out, Piece(f"{END}\n", markup=True)] if closes else out
