"""Sessions of environments, played where they are; what a worker process does is the same."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Session, Task, Verdict
from nemotron_jax.environments.sound import sound_text

_MAX_REASON = 300  # characters of an error: it may quote a whole turn


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
        return {place: self._answer(place, turn) for place, turn in turns.items()}

    def verify(self) -> list[Verdict]:
        """Every session's verdict."""
        return list(map(_judged, self._sessions))

    def close(self) -> None:
        """Give back what the sessions hold."""
        for session in self._sessions:
            if isinstance(session, Session):
                with contextlib.suppress(Exception):  # what is left of it is no verdict's matter
                    session.close()
        self._sessions = []

    def _answer(self, place: int, turn: dict[str, Any]) -> Reply:
        session = self._sessions[place]
        if isinstance(session, Verdict):
            return Reply((), over=True)
        try:
            messages = session.reply(turn)
            return Reply(tuple(messages or ()), session.over)
        except Exception as error:  # of somebody's own session: the others go on
            self._sessions[place] = failure(session.task, error)
            with contextlib.suppress(Exception):
                session.close()
            return Reply((), over=True)


def _started(task: Task) -> Session | Verdict:
    try:
        return registry[task.environment].start(task)
    except Exception as error:  # whatever keeps it from starting is not the model's fault
        return failure(task, error)


def _judged(session: Session | Verdict) -> Verdict:
    if isinstance(session, Verdict):
        return session
    try:
        verdict = session.verify()
        if isinstance(verdict, Verdict):
            return verdict
        raise TypeError(f"verify gave {type(verdict).__name__}, which is no Verdict")
    except Exception as error:
        return failure(session.task, error)


def failure(task: Task, error: Exception) -> Verdict:
    """The verdict on an episode whose session failed, in a text that can be written down."""
    return Verdict(0.0, infra_error=sound_text(f"{task.environment}: {error!r}"[:_MAX_REASON]))
