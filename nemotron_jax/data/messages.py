"""Conversations from jsonl files in messages format and from the environments' oracles."""

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.data.chat.render import DEFAULT, ChatOptions, text_of
from nemotron_jax.data.chat_rows import OtherForm, read_row
from nemotron_jax.environments.base import Environment, Task, play
from nemotron_jax.environments.catalogue import task_source
from nemotron_jax.environments.turns import Turn

MESSAGES, ORACLE, SLIPS = "messages:", "oracle:", "slips:"
# Endings of files that hold rows in another way than as lines of JSON.
_NO_LINES = (".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".zip", ".xz", ".bz2")


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

    @property
    def untold_calls(self) -> int:
        """Conversations that call tools which the model is not shown."""
        every = (*self.train, *self.held_out)
        return sum(not c.tools and any("tool_calls" in m for m in c.messages) for c in every)


def read_messages(path: str | Path, held_out_fraction: float, bad_rows: str) -> Conversations:
    """The conversations of a jsonl file, one object with `messages` a row, or of a .json list.

    Which side a conversation is on depends on its text alone. A bad row raises ValueError with
    file and row, or is left out where `bad_rows` is `drop`.
    """
    train, held_out, dropped = [], [], []
    for number, found in _rows(Path(path)):
        place = f"{path}: row {number}"
        try:
            row = _parsed(found) if isinstance(found, bytes) else found
            conversation = check_row(row, origin=place)
        except ValueError as error:
            if bad_rows == "error":
                way = "mend the row, or set sft.bad_rows='drop'"
                way = "convert the file" if isinstance(error, OtherForm) else way
                raise ValueError(f"{place}: {error}; {way}") from None
            dropped.append(f"{place}: {error}")
            continue
        share = int(conversation.digest()[:8], 16) / 2**32
        (held_out if share < held_out_fraction else train).append(conversation)
    return Conversations(tuple(train), tuple(held_out), tuple(dropped))


def check_row(row: Any, *, origin: str = "") -> Conversation:
    """A row as a conversation; ValueError says which message breaks which rule."""
    messages, tools, options = read_row(row)
    return Conversation(messages, tools, options, origin)


def oracle_source(name: str) -> tuple[Environment, int | None]:
    """The environment and level that `oracle:NAME/LEVEL` names."""
    return task_source(name.removeprefix(ORACLE), f"data.sources={name!r}")


def slip_source(name: str) -> tuple[Environment, int | None, str]:
    """The environment, level and slip that `slips:NAME/LEVEL:SLIP` names."""
    rest = name.removeprefix(SLIPS)
    # From the right: MODULE:CLASS and rows:FILE have a colon of their own.
    tasks, _, slip = rest.rpartition(":") if ":" in rest else (rest, "", "")
    environment, level = task_source(tasks, f"data.sources={name!r}")
    known = sorted(environment.slips(environment.split(0, "train", 0, level=level)))
    if slip not in known:
        raise ValueError(
            f"data.sources={name!r}: the slip must be one of {', '.join(known)}; write "
            f"{SLIPS}NAME/LEVEL:SLIP"
        )
    return environment, level, slip


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
    messages: list[dict] = []
    verdict = play(environment, task, turns, lambda session, said: messages.extend(said))
    return Conversation(tuple(messages), task.tools, DEFAULT, task.id), verdict.reward


def without_reasoning(conversation: Conversation) -> Conversation:
    """A conversation with its answers as they are and without what was thought before them."""
    messages = []
    for message in conversation.messages:
        if message.get("reasoning_content"):
            message = {key: v for key, v in message.items() if key != "reasoning_content"}
            message["content"] = text_of(message).lstrip("\n")  # these stood behind the thinking
        messages.append(message)
    return dataclasses.replace(conversation, messages=tuple(messages))


def reasons(conversation: Conversation) -> bool:
    """Whether some assistant turn thinks in `reasoning_content`."""
    return any(str(m.get("reasoning_content") or "").strip() for m in conversation.messages)


def split_at_users(conversation: Conversation) -> list[Conversation]:
    """One example for each user turn whose answers are learned, the turns before it as history.

    The template leaves out past reasoning, so a conversation that reasons shows each thought only
    where its own turn is the last; one without reasoning is a single example. What an assistant
    says before the first user turn is an example too.
    """
    messages = conversation.messages
    starts = sorted({0, *(i for i, m in enumerate(messages) if m["role"] == "user")})
    if not conversation.options.truncate_history_thinking or not reasons(conversation):
        return [conversation]
    parts = []
    for first, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
        history = [
            message | {"weight": 0} if message["role"] == "assistant" else message
            for message in messages[:first]
        ]
        own = messages[first:stop]
        if any(m["role"] == "assistant" and m.get("weight", 1) for m in own):
            parts.append(dataclasses.replace(conversation, messages=(*history, *own)))
    return parts


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Each row with its number: a line as bytes, or the value that a .json list holds.

    Only a line feed ends a line: text may hold U+2028 and its kin.
    """
    if path.suffix.lower() in _NO_LINES:
        raise ValueError(
            f"data.sources: {path} is a table or an archive; write its rows as jsonl, one JSON "
            "object a line"
        )
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".json" and (rows := _listed(file.read())) is not None:
                yield from enumerate(rows, start=1)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(
            f"data.sources: {path} cannot be read ({error}); name a jsonl file in UTF-8"
        ) from error


def _listed(content: bytes) -> list | None:
    """The rows of a file that is one list or one row; None where it holds JSON lines after all."""
    try:
        found = json.loads(content.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else [found]


def is_conversations(source: str) -> bool:
    """Whether a data source gives conversations and not text."""
    return source.startswith((MESSAGES, ORACLE, SLIPS))


def source_names(sources: Sequence[str]) -> None:
    """Raise ValueError for a source that is none of conversations."""
    for source in sources:
        if not is_conversations(source):
            raise ValueError(
                f"data.sources={source!r}: fine-tuning reads {MESSAGES}FILE, {ORACLE}NAME/LEVEL or "
                f"{SLIPS}NAME/LEVEL:SLIP"
            )
        if source.startswith(SLIPS):
            slip_source(source)
        if source.startswith(ORACLE):
            oracle_source(source)
