"""A body of /v1/responses as the chat request that it amounts to."""

from collections.abc import Mapping
from typing import Any

from nemotron_jax.config.untrusted import shown
from nemotron_jax.serving.chat_request import MOST_MESSAGES, MOST_TOOLS, ChatRequest, read_chat
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served

LOGPROBS = "message.output_text.logprobs"  # of `include`
# What needs answers that are kept, which this server has none of.
_STORED = {
    "previous_response_id": "no answers are kept here; send the whole conversation as input",
    "conversation": "no conversations are kept here; send the whole one as input",
    "prompt": "no prompts are kept here; send instructions and input",
}
# Fields by their names in a chat request; those that both have keep theirs.
_RENAMED = {"max_output_tokens": "max_completion_tokens", "input": "messages"}
_OWN = (*_STORED, *_RENAMED, "instructions", "tools", "text", "reasoning", "include", "background")


def read_response(fields: Fields, served: Served) -> ChatRequest:
    """The request of a body; Refusal names the field that is wrong."""
    for name, rule in _STORED.items():
        if fields.get(name) is not None:
            raise fields.refuse(name, rule)
    if fields.flag("background"):
        raise fields.refuse("background", "answers come while the client waits; leave it out")
    if fields.integer("n", 1, 1, 2**31) != 1:
        raise fields.refuse("n", "a response is one; ask again with another seed")
    chat = {name: value for name, value in fields.values().items() if name not in _OWN}
    chat |= {"messages": _messages(fields), "tools": _tools(fields)}
    chat["max_completion_tokens"] = fields.get("max_output_tokens")
    chat["response_format"] = fields.part("text").part("format").values() or None
    include = fields.get("include") or []
    if not isinstance(include, list):
        raise fields.refuse("include", "must be a list of names")
    chat["logprobs"] = LOGPROBS in include
    if not chat["logprobs"]:
        chat.pop("top_logprobs", None)  # as the clients' default of 0 has no meaning then
    chat["reasoning_effort"] = fields.part("reasoning").text("effort")
    try:
        return read_chat(Fields(chat), served)
    except Refusal as refusal:
        raise _renamed(refusal) from None


def _renamed(refusal: Refusal) -> Refusal:
    """The refusal with the names that the client knows."""
    text, param = str(refusal), refusal.param or ""
    for own, name in (*_RENAMED.items(), ("text.format", "response_format")):
        if param.startswith(name):
            # A place among messages is none among the items of the input.
            param = own if name == "messages" else own + param.removeprefix(name)
            text = text.replace(name, own)
    return Refusal(text, param or None, status=refusal.status, code=refusal.code)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Instructions and the items of the input, those of one turn in one message."""
    messages = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    given = fields.get("input")
    if given is None or given == []:
        raise Refusal("input: is missing; give a text or a list of items", "input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    turn: dict[str, Any] | None = None  # an assistant's that may go on
    for number, item in enumerate(fields.objects("input", MOST_MESSAGES)):
        try:
            message, whole = _message(item)
        except ValueError as error:
            raise Refusal(f"input[{number}]: {error}", f"input[{number}]") from None
        if whole:
            messages.append(message)
            turn = None
        elif turn is None or not _joined(turn, message):
            messages.append(message)
            turn = message
    return messages


def _joined(turn: dict[str, Any], more: dict[str, Any]) -> bool:
    """Whether a part of a turn goes on with it, in the order in which a model writes; if so, it is
    added."""
    order = ("reasoning_content", "content", "tool_calls")
    place = lambda message: max(order.index(name) for name in order if name in message)
    if place(more) < place(turn) or (place(more) == place(turn) and "tool_calls" not in more):
        return False
    calls = [*turn.get("tool_calls", ()), *more.get("tool_calls", ())]
    turn |= more | ({"tool_calls": calls} if calls else {})
    return True


def _message(item: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What an item says as a message, and whether that is a whole one and no part of a turn."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        return {"role": role, "content": item.get("content")}, role != "assistant"
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        listed = parts if isinstance(parts, list) else [None]
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in listed]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its content must be a list of texts")
        return {"role": "assistant", "reasoning_content": "".join(texts)}, False
    if kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"function": call}]}, False
    if kind == "function_call_output":
        return {"role": "tool", "content": item.get("output")}, True
    if kind == "item_reference":
        raise ValueError("no items are kept here; send them whole, as clients do with store=false")
    raise ValueError(f"type={shown(kind)[:60]}: items are messages, reasoning and function calls")


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools in the form that chats have."""
    tools = []
    for number, tool in enumerate(fields.objects("tools", MOST_TOOLS)):
        if tool.get("type") != "function":
            kind = shown(tool.get("type"))[:60]
            rule = "this server has no tools of its own; give functions"
            raise Refusal(f"tools[{number}].type={kind}: {rule}", f"tools[{number}]")
        own = {name: value for name, value in tool.items() if name != "type" and value is not None}
        tools.append({"type": "function", "function": own.get("function", own)})
    return tools
