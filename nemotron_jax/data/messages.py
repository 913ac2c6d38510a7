"""Conversations from jsonl files in messages format and from the environments' oracles."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.data.chat.render import (
    ANSWER,
    DEFAULT,
    THINK,
    ChatOptions,
    calls_of,
    text_of,
)
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Environment, Task
from nemotron_jax.environments.turns import Turn

MESSAGES, ORACLE, SLIPS = "messages:", "oracle:", "slips:"
ROLES = ("system", "user", "assistant", "tool")
_ROW_FIELDS = ("messages", "tools", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with the tools and template switches that they were made under."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    options: ChatOptions = DEFAULT
    origin: str = ""  # where it was read, for errors

    def digest(self) -> str:
        """SHA-256 of what the model is shown."""
        shown = [self.messages, self.tools, dataclasses.asdict(self.options)]
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Conversations:
    """What a source gave: conversations to train on and others held out, and how many were bad."""

    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
    dropped: tuple[str, ...] = ()  # a line about each row left out


def read_messages(path: str | Path, held_out_fraction: float, bad_rows: str) -> Conversations:
    """The conversations of a jsonl file, one object with `messages` a row.

    Which side a conversation is on depends on its text alone. A bad row raises ValueError with
    file and row, or is left out where `bad_rows` is `drop`.
    """
    train, held_out, dropped = [], [], []
    for number, line in _lines(Path(path)):
        if not line.strip():
            continue
        try:
            conversation = check_row(_parsed(line), origin=f"{path}: row {number}")
        except ValueError as error:
            if bad_rows == "error":
                raise ValueError(
                    f"{path}: row {number}: {error}; mend the row, or set sft.bad_rows='drop'"
                ) from None
            dropped.append(f"{path}: row {number}: {error}")
            continue
        share = int(conversation.digest()[:8], 16) / 2**32
        (held_out if share < held_out_fraction else train).append(conversation)
    return Conversations(tuple(train), tuple(held_out), tuple(dropped))


def check_row(row: Any, *, origin: str = "") -> Conversation:
    """A row as a conversation; ValueError says which message breaks which rule."""
    if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list):
        raise ValueError("it is not an object with a list `messages`")
    messages, tools = row["messages"], row.get("tools") or []
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise ValueError("`tools` is not a list of functions with names")
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError("`chat_template_kwargs` is not an object")
    options = ChatOptions.from_kwargs(kwargs)
    waiting: set[str] | int = 0
    for number, message in enumerate(messages):
        try:
            waiting = _check_message(message, waiting)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise ValueError("no assistant turn to learn from")
    return Conversation(tuple(messages), tuple(tools), options, origin)


def oracle_source(name: str) -> tuple[Environment, int | None]:
    """The environment and level that `oracle:NAME/LEVEL` names."""
    return _task_source(name, name.removeprefix(ORACLE))


def slip_source(name: str) -> tuple[Environment, int | None, str]:
    """The environment, level and slip that `slips:NAME/LEVEL:SLIP` names."""
    tasks, _, slip = name.removeprefix(SLIPS).partition(":")
    environment, level = _task_source(name, tasks)
    known = sorted(environment.slips(environment.split(0, "train", 0, level=level)))
    if slip not in known:
        raise ValueError(
            f"data.sources={name!r}: the slip must be one of {', '.join(known)}; write "
            f"{SLIPS}NAME/LEVEL:SLIP"
        )
    return environment, level, slip


def _task_source(name: str, tasks: str) -> tuple[Environment, int | None]:
    environment, _, level = tasks.partition("/")
    if environment not in registry:
        raise ValueError(
            f"data.sources={name!r}: no environment is called {environment!r}; "
            f"there are {', '.join(sorted(registry))}"
        )
    found = registry[environment]
    if level and not (level.isdecimal() and int(level) < found.levels):
        raise ValueError(f"data.sources={name!r}: the level must be 0 to {found.levels - 1}")
    return found, int(level) if level else None


def oracle_conversations(
    environment: Environment,
    level: int | None,
    count: int,
    *,
    split: str,
    seed: int = 0,
    slip: str = "",
) -> list[Conversation]:
    """The oracle's way through the first `count` tasks of a split, or another that `slip` names."""
    tasks = (environment.split(seed, split, index, level=level) for index in range(count))
    if slip:
        return [played_conversation(environment, t, environment.slips(t)[slip])[0] for t in tasks]
    return [oracle_conversation(environment, task) for task in tasks]


def oracle_conversation(environment: Environment, task: Task) -> Conversation:
    """One task's messages, the oracle's turns, and what the environment replied to each."""
    found, reward = played_conversation(environment, task, environment.oracle(task))
    assert reward == 1, f"the oracle of {task.id} earns {reward}"
    return found


def played_conversation(
    environment: Environment, task: Task, turns: Sequence[Turn | str]
) -> tuple[Conversation, float]:
    """A task played with these turns up to its end, and the reward of it."""
    messages = list(task.messages)
    with environment.start(task) as session:
        for turn in turns:
            if session.over:
                break
            messages.append(Turn.of(turn).message())
            messages += session.reply(turn)
        reward = session.verify().reward
    return Conversation(tuple(messages), task.tools, DEFAULT, task.id), reward


def without_reasoning(conversation: Conversation) -> Conversation:
    """The same answers, no turn thought about."""
    messages = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            message = {key: v for key, v in message.items() if key != "reasoning_content"}
            text = text_of(message)
            if THINK in text and ANSWER in text:
                message["content"] = text.split(ANSWER)[-1].lstrip("\n")
        messages.append(message)
    return dataclasses.replace(conversation, messages=tuple(messages))


def reasons(conversation: Conversation) -> bool:
    """Whether some assistant turn thinks in `reasoning_content`."""
    return any(str(m.get("reasoning_content") or "").strip() for m in conversation.messages)


def split_at_users(conversation: Conversation) -> list[Conversation]:
    """One example for each user turn whose answers are learned, the turns before it as history.

    The template leaves out past reasoning, so a conversation that reasons shows each thought only
    where its own turn is the last; one without reasoning is a single example.
    """
    users = [i for i, m in enumerate(conversation.messages) if m["role"] == "user"]
    keeps = not conversation.options.truncate_history_thinking
    if len(users) < 2 or keeps or not reasons(conversation):
        return [conversation]
    parts = []
    for first, stop in zip(users, [*users[1:], len(conversation.messages)], strict=True):
        history = [
            message | {"weight": 0} if message["role"] == "assistant" else message
            for message in conversation.messages[:first]
        ]
        own = conversation.messages[first:stop]
        if any(m["role"] == "assistant" and m.get("weight", 1) for m in own):
            parts.append(dataclasses.replace(conversation, messages=(*history, *own)))
    return parts


def _check_message(message: Any, waiting: set[str] | int) -> set[str] | int:
    """Checks one message; the calls that replies may still answer, by id or by number."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(f"role {role!r:.40} is unknown; use one of {', '.join(ROLES)}")
    text = text_of(message)
    if message["role"] == "tool":
        return _answered(message, waiting)
    if message["role"] != "assistant":
        return 0
    calls, reasoning = list(calls_of(message)), message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError("`reasoning_content` is not text")
    if not calls and not text.strip() and not (reasoning or "").strip():
        raise ValueError("the assistant turn is empty: no content, reasoning or call")
    ids = {str(call["id"]) for call in message.get("tool_calls") or () if call.get("id")}
    return ids if len(ids) == len(calls) and calls else len(calls)


def _answered(message: Mapping[str, Any], waiting: set[str] | int) -> set[str] | int:
    name = message.get("tool_call_id")
    if isinstance(waiting, set) and name is not None:
        if name not in waiting:
            raise ValueError(f"the tool reply answers {name!r}, which no call before it has as id")
        return waiting - {name}
    left = len(waiting) if isinstance(waiting, set) else waiting
    if left == 0:
        raise ValueError("a tool reply without a call of the turn before it")
    return left - 1


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.sources: {path} cannot be read ({error}); name a jsonl file in UTF-8"
        ) from error


def source_names(sources: Sequence[str]) -> None:
    """Raise ValueError for a source that is none of conversations."""
    for source in sources:
        if not source.startswith((MESSAGES, ORACLE, SLIPS)):
            raise ValueError(
                f"data.sources={source!r}: fine-tuning reads {MESSAGES}FILE, {ORACLE}NAME/LEVEL or "
                f"{SLIPS}NAME/LEVEL:SLIP"
            )
        if source.startswith(SLIPS):
            slip_source(source)
        if source.startswith(ORACLE):
            oracle_source(source)
