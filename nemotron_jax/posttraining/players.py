"""Sessions of environments, played where they are; what a worker process does is the same."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Session, Task, Verdict


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn: messages to read, none when the episode is over."""

    messages: tuple[dict, ...]
    over: bool


# Waits for the answers to turns that were given before; nothing else is asked meanwhile.
Replies = Callable[[], dict[int, Reply]]


class Players(Protocol):
    """Sessions by their place, each playing one task."""

    def start(self, tasks: Sequence[Task]) -> None: ...

    def begin_reply(self, turns: dict[int, dict[str, Any]]) -> "Replies": ...

    def reply(self, turns: dict[int, dict[str, Any]]) -> dict[int, Reply]: ...

    def verify(self) -> list[Verdict]: ...

    def close(self) -> None: ...


class Here:
    """Sessions in this process. A session that cannot start is an infrastructure failure."""

    def __init__(self) -> None:
        self._sessions: list[Session | Verdict] = []

    def start(self, tasks: Sequence[Task]) -> None:
        """Begin with these tasks; earlier sessions are closed."""
        self.close()
        self._sessions = [_started(task) for task in tasks]

    def begin_reply(self, turns: dict[int, dict[str, Any]]) -> Replies:
        """What gives the answers; there is nobody else to work on them before it is asked."""
        return lambda: self.reply(turns)

    def reply(self, turns: dict[int, dict[str, Any]]) -> dict[int, Reply]:
        """The answers to the assistant's messages at these places."""
        return {place: _answer(self._sessions[place], turn) for place, turn in turns.items()}

    def verify(self) -> list[Verdict]:
        """Every session's verdict."""
        return [s if isinstance(s, Verdict) else s.verify() for s in self._sessions]

    def close(self) -> None:
        """Give back what the sessions hold."""
        for session in self._sessions:
            if isinstance(session, Session):
                session.close()
        self._sessions = []


def _started(task: Task) -> Session | Verdict:
    try:
        return registry[task.environment].start(task)
    except Exception as error:  # whatever keeps it from starting is not the model's fault
        return Verdict(0.0, infra_error=f"{task.environment}: {error!r}")


def _answer(session: Session | Verdict, turn: dict[str, Any]) -> Reply:
    if isinstance(session, Verdict):
        return Reply((), over=True)
    messages = session.reply(turn)
    return Reply(tuple(messages), session.over)
