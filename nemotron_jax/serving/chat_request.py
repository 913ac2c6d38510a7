"""A body of /v1/chat/completions as a prompt's ids and what is wanted of its continuation."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemotron_jax.config.untrusted import shown
from nemotron_jax.data.chat.render import ANSWER, END, ChatOptions, calls_of, text_of
from nemotron_jax.data.chat.tokens import encode_chat, encode_prompt
from nemotron_jax.decoding.wanted import MOST_TOP, Budget
from nemotron_jax.serving.fields import Fields, characters, check_parts
from nemotron_jax.serving.formats import formatted
from nemotron_jax.serving.grammars import Format, calls_of_tools
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.wishes import (
    Job,
    apart,
    check_lacking,
    check_size,
    checked_format,
    job_of,
    samples_of,
    sampling_of,
    stop_tokens_of,
    wanted_format,
)

MOST_MESSAGES, MOST_TOOLS = 10_000, 512
_THOUGHTS = ("reasoning_content", "reasoning")  # of past turns, which the template leaves out
# Fields of vLLM's that change what is rendered.
_LACKING = ("chat_template", "continue_final_message", "documents", "echo")
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"developer": "system"}


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """What is rendered: messages, tools and the template's switches."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    options: ChatOptions
    nonempty: bool = False
    must_call: Sequence[Mapping[str, Any]] = ()  # tools of which one has to be called
    once: bool = False

    def ids(self, served: Served, prefix: Sequence[int] | None = None) -> list[int]:
        """The prompt's ids. `prefix` are those that the conversation had up to the end of its last
        assistant turn, which stand as they are: text encoded anew may give others."""
        try:
            ids = encode_prompt(served.tokenizer, self.messages, self.tools, self.options)
            return ids if prefix is None else self._after(served, ids, prefix)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "it cannot be rendered"
            raise Refusal(reason.removeprefix("chat: ")[:300], "messages") from None

    def _after(self, served: Served, ids: list[int], prefix: Sequence[int]) -> list[int]:
        """The given ids, and those of the template from the end of the last assistant turn on."""
        turns = [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not turns:
            raise Refusal(
                "required_prefix_token_ids: the messages hold no assistant turn whose ids it "
                "could give",
                "required_prefix_token_ids",
            )
        end = served.tokenizer.token_id(END)  # of a turn; no text encodes to it
        told = self.messages[: turns[-1] + 1]
        past = encode_chat(served.tokenizer, told, self.tools, self.options).ids.tolist()
        place = [n for n, token in enumerate(ids) if token == end][past.count(end) - 1]
        kept = list(prefix[:-1] if prefix and prefix[-1] == end else prefix)
        return kept + ids[place:]


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What a client wants of a chat."""

    jobs: Sequence[Job]
    tools: Sequence[Mapping[str, Any]] | None
    thinking: bool
    nonempty: bool
    parallel: bool
    logprobs: bool
    reasons: bool = True  # the reasoning is shown
    held: bool = False  # calls come as a grammar has them


@formatted
def read_chat(fields: Fields, served: Served) -> ChatRequest:
    """The request of a body; Refusal names the field that is wrong."""
    prompt = read_prompt(fields, served)
    logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, 0, MOST_TOP)
    if top and not logprobs:
        raise fields.refuse("top_logprobs", "needs logprobs=true")
    stops = stop_tokens_of(fields, served, served.turn_stops)
    thinking = prompt.options.enable_thinking
    budget = _budget(fields, served, prompt.options)
    form = _held_calls(fields, served, stops, prompt, budget)
    held = form is not None
    form = form or wanted_format(fields, served, stops, thinking=thinking)
    sampling = sampling_of(fields, served, stop_tokens=stops, top_logprobs=top, budget=budget)
    prefix = fields.token_ids("required_prefix_token_ids", served.vocabulary)
    ids = prompt.ids(served, prefix)
    return ChatRequest(
        jobs=apart(job_of(fields, served, ids, sampling, samples_of(fields)), form),
        tools=prompt.tools,
        thinking=thinking,
        nonempty=prompt.nonempty,
        parallel=fields.flag("parallel_tool_calls", True),
        logprobs=logprobs,
        reasons=fields.flag("include_reasoning", True),
        held=held,
    )


def read_prompt(fields: Fields, served: Served) -> ChatPrompt:
    """Messages, tools and switches of a body; refused before they are read where no prompt that
    fits could hold them."""
    check_lacking(fields, _LACKING)
    if not fields.flag("add_generation_prompt", True):
        raise fields.refuse("add_generation_prompt", "is always written; leave it out")
    tools, messages = characters(fields.get("tools")), characters(fields.get("messages"), _THOUGHTS)
    check_size(served, tools, "tools")
    check_size(served, tools + messages, "messages")
    if fields.get("messages") is None:
        raise Refusal("messages: is missing; give a list of messages", "messages")
    given = fields.objects("messages", MOST_MESSAGES)
    if not given:
        raise fields.refuse("messages", "must hold at least one message")
    messages = []
    for number, message in enumerate(given):
        try:
            messages.append(_message(message))
        except ValueError as error:
            where = f"messages[{number}]"
            raise Refusal(f"{where}: {str(error).removeprefix('chat: ')[:300]}", where) from None
    choice, tools = _allowed(fields, _tools(fields))
    must_call, named = _must_call(fields, choice, tools)
    tools = [] if choice == "none" else tools
    switches = fields.part("chat_template_kwargs").values()
    nonempty = switches.pop("force_nonempty_content", False)
    effort = fields.text("reasoning_effort")
    if effort in ("low", "minimal"):
        switches.setdefault("low_effort", True)
    elif effort == "none":
        switches.setdefault("enable_thinking", False)
    try:
        options = ChatOptions.from_kwargs(switches)
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)[:300], "chat_template_kwargs") from None
    return ChatPrompt(messages, tools or None, options, nonempty is True, must_call, named)


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message with what the template reads of it."""
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"role={shown(role)[:40]}: must be one of {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": _ROLES[role], "content": text_of(_spoken(given))}
    if role != "assistant":
        return message
    thought = given.get("reasoning_content") or given.get("reasoning")
    if isinstance(thought, str):
        message["reasoning_content"] = thought
    for text in _arguments(given.get("tool_calls")):
        check_parts(text.encode("utf-8", "replace"))
    calls = [
        {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        for name, arguments in calls_of(given)
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _spoken(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its refusals, which clients keep apart, as the texts that they are."""
    content = message.get("content")
    if content is None and isinstance(message.get("refusal"), str):
        return {**message, "content": message["refusal"]}
    if not isinstance(content, list):
        return message
    refused = lambda part: isinstance(part, Mapping) and part.get("type") == "refusal"
    spoken = [{"text": part.get("refusal")} if refused(part) else part for part in content]
    return {**message, "content": spoken}


def _arguments(calls: Any) -> Iterator[str]:
    """Those of the calls of a message that are texts, in which JSON is to be parsed."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        text = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(text, str):
            yield text


def _tools(fields: Fields) -> list[Mapping[str, Any]]:
    tools = fields.objects("tools", MOST_TOOLS)
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = _name_of(tool)
        if not isinstance(name, str) or not name:
            raise Refusal(f"tools[{number}]: needs a function with a name", f"tools[{number}]")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise Refusal(f"tools[{number}]: parameters must be a schema", f"tools[{number}]")
    return tools


def _allowed(fields: Fields, tools: list[Mapping[str, Any]]) -> tuple[Any, list[Mapping[str, Any]]]:
    """The choice, and the tools that it is among: `allowed_tools` names some and says how."""
    choice = fields.get("tool_choice")
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return choice, tools
    part = fields.part("tool_choice")
    part = part if part.get("allowed_tools") is None else part.part("allowed_tools")
    if part.get("mode") not in ("auto", "required"):
        raise part.refuse("mode", "must be auto or required")
    names = [_name_of(tool) for tool in part.objects("tools", MOST_TOOLS)]
    kept = [tool for tool in tools if _name_of(tool) in names]
    if not kept or {_name_of(tool) for tool in kept} != {*map(str, names)}:
        raise part.refuse("tools", "must name some of the tools, and no others")
    return part.get("mode"), kept


def _name_of(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _must_call(
    fields: Fields, choice: Any, tools: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """The tools of which one has to be called, and whether it is one by name, then once."""
    if choice in (None, "none", "auto"):
        return (), False
    if choice == "required":
        if not tools:
            raise fields.refuse("tool_choice", "there is no tool that could be called; give some")
        return tools, False
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        rule = 'must be none, auto, required, or {"type": "function", "function": {"name": …}}'
        raise fields.refuse("tool_choice", rule)
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in tools if tool.get("function", tool)["name"] == name]
    if not named:
        raise fields.refuse("tool_choice", "names none of the tools")
    return named[:1], True


def _held_calls(
    fields: Fields,
    served: Served,
    stops: tuple[int, ...],
    prompt: ChatPrompt,
    budget: Budget | None,
) -> Format | None:
    """What calls are held to: where one has to come, or a tool is strict, or there is a format;
    None where calls are the model's own."""
    tools = prompt.tools or ()
    strict = any(tool.get("function", tool).get("strict") is True for tool in tools)
    formed = fields.part("response_format").get("type") not in (None, "text")
    if not tools or not (prompt.must_call or strict or formed):
        return None
    form = calls_of_tools(
        fields,
        served.tokenizer,
        served.vocabulary,
        stops,
        prompt.must_call or tools,
        single=prompt.once or not fields.flag("parallel_tool_calls", True),
        required=bool(prompt.must_call),
        thinking=prompt.options.enable_thinking,
        budgeted=budget is not None,
    )
    return checked_format(fields, form)


def _budget(fields: Fields, served: Served, options: ChatOptions) -> Budget | None:
    """Where the reasoning is closed, if the request bounds it."""
    own = fields.integer("thinking_token_budget", options.reasoning_budget, 0, 2**31 - 1)
    if own is None or not options.enable_thinking:
        return None
    return Budget(own, served.tokenizer.token_id(ANSWER))
