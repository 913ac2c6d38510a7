"""A row of a file of conversations, checked and put into the one form that is learned from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_jax.data.chat.render import ANSWER, THINK, ChatOptions, calls_of, text_of
from nemotron_jax.data.chat.schemas import Schemas, strict_json
from nemotron_jax.data.chat.tools import describe_tools

ROLES = ("system", "user", "assistant", "tool")
# What a message may hold, by role. A key that nobody reads could mean anything, such as a turn
# that is not to be learned: it is refused, unless it is known to say nothing about the text.
_KEYS = {
    "system": frozenset(("role", "content")),
    "user": frozenset(("role", "content")),
    "assistant": frozenset(("role", "content", "reasoning_content", "tool_calls", "weight")),
    "tool": frozenset(("role", "content", "tool_call_id")),
}
_SAY_NOTHING = frozenset(
    ("name", "id", "index", "created", "created_at", "timestamp", "model", "usage", "metadata")
    + ("tool_name", "finish_reason", "stop_reason", "logprobs", "annotations", "reasoning_details")
)
# Keys of a row that would change what is learned, were they read.
_ROW_KEYS_UNREAD = ("system", "system_prompt", "functions", "weight", "train")
# Levels of lists and objects in a row: far above what tools have, far below what recursion holds.
_DEEPEST = 64

_TURN = 'write each turn as {"role": "user" or "assistant", "content": TEXT} of a list `messages`'
_OTHER_FORMS = (
    (("conversations",), "ShareGPT's form (`conversations` of `from` and `value`)"),
    (("instruction",), "Alpaca's form (`instruction`, `input`, `output`)"),
    (("chosen", "rejected"), "a pair of preferences"),
    (("prompt", "completion"), "a prompt with its completion"),
    (("prompt", "response"), "a prompt with its response"),
    (("question", "answer"), "a question with its answer"),
    (("input", "output"), "an input with its output"),
    (("text",), "a text, which pre-training reads (stage `pretrain`, data.sources=hf:FILE)"),
)


class OtherForm(ValueError):
    """A row of another format, as all rows of its file are."""


def read_row(
    row: Any,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...], ChatOptions]:
    """Messages, tools and switches of a row; ValueError says which message breaks which rule.

    Nulls are taken out: tables write them for every field that another row has. Thinking stands in
    `reasoning_content` wherever the row has it, `weight` says what is not learned.
    """
    found = _decoded(row.get("messages")) if isinstance(row, Mapping) else None
    if not isinstance(found, list):
        raise _form_of(row)
    for key in _ROW_KEYS_UNREAD:
        if row.get(key) not in (None, "", [], {}, 1):
            raise ValueError(f"the row's key {key!r} is not read; put what it says in `messages`")
    try:
        tools = _tools(row.get("tools"))
    except ValueError as error:
        raise ValueError(f"`tools`: {error}") from None
    options = _options(row.get("chat_template_kwargs"))
    reader = _Messages(tools)
    for number, message in enumerate(found):
        try:
            reader.add(message)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    reader.finish()
    return tuple(reader.messages), tuple(tools), options


class _Messages:
    """Reads the messages of a row one by one, and whether tools answer what was called."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.messages: list[Mapping[str, Any]] = []
        self._schemas = Schemas(tools)
        self._declared = {tool.get("function", tool)["name"] for tool in tools}
        self._waiting: set[str] | int = 0  # calls that replies may still answer, by id or number
        self._order: list[str] = []  # ids of the calls of the turn before

    def add(self, given: Any) -> None:
        """The next message."""
        if not isinstance(given, Mapping):
            raise ValueError(f"role {given!r:.40} is unknown; use one of {', '.join(ROLES)}")
        message = _plain(given, null_arguments=True)
        if "content" in given:
            message.setdefault("content", None)  # an assistant that only calls writes null
        if message.get("role") == "developer":
            message["role"] = "system"
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            hint = "; `from` and `value` are ShareGPT's" if "from" in message else ""
            raise ValueError(f"role {role!r:.40} is unknown; use one of {', '.join(ROLES)}{hint}")
        if role == "assistant":
            _same_keys(message)
        _check_keys(message, role)
        text = text_of(message)
        if role == "tool":
            self._waiting = _answered(message, self._waiting)
        elif self._waiting:
            raise ValueError(
                "the turn before calls tools that are not all answered; give each call its reply "
                "as a `tool` message"
            )
        elif role == "assistant":
            self._assistant(message, text)
        self.messages.append(message)
        if role == "tool" and not self._waiting:
            self._order_replies()

    def finish(self) -> None:
        """After the last message: calls may stand open there, but not some of a turn's."""
        if self._waiting and self.messages[-1]["role"] == "tool":
            raise ValueError("the last calls are not all answered; add their replies, or none")
        learned = (m["role"] == "assistant" and m.get("weight", 1) for m in self.messages)
        if not any(learned):
            raise ValueError("no assistant turn to learn from")

    def _assistant(self, message: dict[str, Any], text: str) -> None:
        _move_thinking(message, text)
        if "tool_calls" in message:
            self._read_calls(message)
        calls = list(calls_of(message))
        said = text_of(message).strip() or message.get("reasoning_content", "").strip()
        if not calls and not said:
            raise ValueError("the assistant turn is empty: no content, reasoning or call")
        for name, _ in calls:
            if self._declared and name not in self._declared:
                raise ValueError(
                    f"it calls {name!r:.40}, which is none of the row's `tools` "
                    f"({', '.join(sorted(self._declared))[:80]})"
                )
        self._order = [str(c["id"]) for c in message.get("tool_calls", ()) if "id" in c]
        ids = set(self._order)
        self._waiting = ids if len(ids) == len(calls) and calls else len(calls)

    def _order_replies(self) -> None:
        """Replies in the order of their calls: the template writes no ids."""
        count = len(self._order)
        replies = self.messages[len(self.messages) - count :]
        if {str(reply.get("tool_call_id")) for reply in replies} == set(self._order):
            place = lambda reply: self._order.index(str(reply["tool_call_id"]))
            self.messages[len(self.messages) - count :] = sorted(replies, key=place)

    def _read_calls(self, message: dict[str, Any]) -> None:
        """The calls as objects; of their arguments, nulls that the tool does not take are gone."""
        calls = _plain(_decoded(message["tool_calls"]), null_arguments=True)
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise ValueError("`tool_calls` is not a list of calls; write a list of objects")
        message["tool_calls"] = [self._call(call) for call in calls]
        if not calls:
            del message["tool_calls"]

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
            return call
        name = str(function.get("name"))
        arguments = {
            key: value
            for key, value in function["arguments"].items()
            if value is not None or self._schemas.takes_null(name, key)
        }
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function


def _move_thinking(message: dict[str, Any], text: str) -> None:
    """Thinking that stands in the content goes where the template's own field is."""
    stated = message.get("reasoning_content", "")
    if not isinstance(stated, str):
        raise ValueError("`reasoning_content` is not text")
    opening = text.lstrip()
    if opening.startswith(THINK) and ANSWER in opening:
        # Line ends beside the tags are the template's to write.
        thought, _, rest = opening.removeprefix(THINK).partition(ANSWER)
        thought = thought.strip("\n")
        if stated.strip() and thought.strip() and stated.strip() != thought.strip():
            raise ValueError("`content` and `reasoning_content` hold different thoughts; keep one")
        message["content"] = rest.lstrip("\n")
        if thought.strip() and not stated.strip():
            message["reasoning_content"] = thought
    # The template looks for these tags in a turn's text, and would cut it or open no thought.
    for place, tags in (("content", (THINK, ANSWER)), ("reasoning_content", (ANSWER,))):
        left = text_of({"content": message.get(place), "role": "assistant"})
        tag = next((tag for tag in tags if tag in left), None)
        if tag:
            raise ValueError(
                f"`{place}` holds {tag} where no thinking opens or ends; put the thinking in "
                f"`reasoning_content`, or begin the content with {THINK} and end it by {ANSWER}"
            )


def _same_keys(message: dict[str, Any]) -> None:
    """One key for what servers and trainers call by two names."""
    if "reasoning" in message:
        thought, other = message.pop("reasoning"), message.get("reasoning_content")
        if not isinstance(thought, str):
            raise ValueError("`reasoning` is not text")
        if (
            isinstance(other, str)
            and other.strip() not in ("", thought.strip())
            and thought.strip()
        ):
            raise ValueError("`reasoning` and `reasoning_content` differ; keep one of them")
        if not other:
            message["reasoning_content"] = thought
    elif message.get("reasoning_details") and not message.get("reasoning_content"):
        raise ValueError("`reasoning_details` is not read; write the text in `reasoning_content`")
    if "train" in message:
        train = message.pop("train")
        if not isinstance(train, bool):
            raise ValueError(f"train={train!r:.40}: must be true or false")
        if bool(message.setdefault("weight", int(train))) != train:
            raise ValueError("`train` and `weight` differ; keep one of them")
    weight = message.get("weight", 1)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise ValueError(f"weight={weight!r:.40}: must be 0 or 1; a turn is learned or not")


def _check_keys(message: dict[str, Any], role: str) -> None:
    """Takes out keys that hold nothing or say nothing; ValueError for others that nobody reads."""
    for key in [key for key in message if key not in _KEYS[role]]:
        value = message.pop(key)
        unlearned = role != "assistant" and key in ("weight", "train") and value in (0, False)
        if key in _SAY_NOTHING or unlearned or value in ("", [], {}):
            continue
        raise ValueError(
            f"key {key!r:.40} of a {role!r} message is unknown; take it out, or use "
            f"{', '.join(sorted(_KEYS[role] - {'role'}))}"
        )


def _answered(message: Mapping[str, Any], waiting: set[str] | int) -> set[str] | int:
    name = message.get("tool_call_id")
    if isinstance(waiting, set) and name is not None:
        if str(name) not in waiting:
            raise ValueError(
                f"the tool reply answers {name!r:.40}, which no call before it has as id"
            )
        return waiting - {str(name)}
    left = len(waiting) if isinstance(waiting, set) else waiting
    if left == 0:
        raise ValueError("a tool reply without a call of the turn before it")
    return left - 1


def _tools(given: Any) -> list[Mapping[str, Any]]:
    tools = _plain(_decoded(given)) or []
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise ValueError("it is not a list of functions with names")
    read = []
    for tool in tools:
        function = tool.get("function", tool)
        parameters = _plain(_decoded(function.get("parameters", {})))
        if not isinstance(parameters, Mapping) or not isinstance(
            parameters.get("properties", {}), Mapping
        ):
            raise ValueError(
                f"tool {function['name']!r:.40}: `parameters` is no schema of an object with "
                "`properties`"
            )
        if "parameters" in function:
            function = {**function, "parameters": parameters}
        read.append({**tool, "function": function} if "function" in tool else function)
    for _ in describe_tools(read):  # raises for a property that is none
        pass
    return read


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _options(given: Any) -> ChatOptions:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError("`chat_template_kwargs` is not an object")
    try:
        kwargs = _plain(given or {})
    except ValueError as error:
        raise ValueError(f"`chat_template_kwargs`: {error}") from None
    return ChatOptions.from_kwargs(kwargs)


def _decoded(value: Any) -> Any:
    """The value of what a table keeps as JSON text, since its columns have one type."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _plain(value: Any, depth: int = _DEEPEST, null_arguments: bool = False) -> Any:
    """A value of JSON without the nulls in its objects; ValueError where it is none of JSON.

    A default that is null stays where the schema allows null: pydantic writes it so. Nulls of a
    call's own arguments stay with `null_arguments`.
    """
    if depth == 0:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    if isinstance(value, Mapping):
        kept = {}
        for key, inner in value.items():
            if inner is not None or (key == "default" and _allows_null(value)):
                kept[_plain(key, depth - 1)] = _plain(inner, depth - 1, null_arguments)
            if null_arguments and key == "arguments" and isinstance(inner, Mapping):
                kept[key] = {name: kept[key].get(name) for name in inner}
        return kept
    if isinstance(value, list | tuple):
        return [_plain(inner, depth - 1, null_arguments) for inner in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                "it holds half of a surrogate pair, which is no character; repair the text"
            ) from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds {value}, which is no number of JSON")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"it holds a {type(value).__name__}, which is no value of JSON")
    return value


def _allows_null(schema: Mapping[str, Any]) -> bool:
    """Whether a schema names null among its types."""
    types = schema.get("type")
    unions = [schema.get(union) for union in ("anyOf", "oneOf")]
    options = [option for union in unions if isinstance(union, list) for option in union]
    return (
        schema.get("nullable") is True
        or (isinstance(types, list) and "null" in types)
        or any(isinstance(one, Mapping) and one.get("type") == "null" for one in options)
    )


def _form_of(row: Any) -> ValueError:
    """What is wrong with a row that has no messages: its form's name, where it is a known one."""
    rule = "it is not an object with a list `messages`"
    if isinstance(row, list) and row and all(_is_turn(one) for one in row):
        return OtherForm(f'{rule}, but the list alone; write {{"messages": [...]}}')
    for key, value in row.items() if isinstance(row, Mapping) else ():
        if isinstance(value, list) and value and all(_is_turn(one) for one in value):
            return OtherForm(f"{rule}, but has one `{key:.40}`; call that `messages`")
    for keys, name in _OTHER_FORMS:
        if isinstance(row, Mapping) and all(key in row for key in keys):
            return OtherForm(f"{rule}, but {name}; {_TURN}")
    return ValueError(rule)


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value
