"""Sessions of environments, played where they are; what a worker process does is the same."""

import contextlib
import dataclasses
import functools
import signal
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Environment, OutOfTime, Session, Task, Verdict
from nemotron_jax.environments.sandbox import runner
from nemotron_jax.environments.sound import sound_text, sound_value
from nemotron_jax.environments.turns import Turn

# Shares of the time for a session's turn. Its calls are begun in the first half; at 0.9 whatever
# the environment does is broken off, and the last tenth is left for saying so.
_FOR_CALLS, _FOR_ALL = 0.5, 0.9
_LOOK_EVERY_S = 0.05  # for a sandbox that somebody else holds; rare, so it may be late
_MAX_REASON = 300  # characters of an error: it may quote a whole turn


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn: messages to read, none when the episode is over.

    `waiting`: the turn is not played yet, since other sessions hold what it needs. `verdict`: the
    session was judged and has ended.
    """

    messages: tuple[dict, ...]
    over: bool
    waiting: bool = False
    verdict: Verdict | None = None


# By place, a turn to play; None asks for the answer to one that was given before and waits.
Turns = Mapping[int, dict[str, Any] | None]
# Waits for the answers to turns that were given before; nothing else is asked meanwhile.
Replies = Callable[[], dict[int, Reply]]


class Players(Protocol):
    """Sessions by their place, each playing one task.

    Any number of them play on any budget of sandboxes: a session that is over is judged and gives
    back what it holds, and a turn that needs a sandbox waits until one is free.
    """

    def start(self, tasks: Sequence[Task]) -> None:
        """Begin a session for each task, at the task's place; earlier sessions are closed."""

    def begin_reply(self, turns: Turns) -> "Replies":
        """Hand over turns; what is given back waits for the answers."""

    def reply(self, turns: Turns) -> dict[int, Reply]:
        """The answers to turns, by place: `begin_reply` and the waiting for it in one."""

    def end(self, places: Collection[int]) -> dict[int, Verdict]:
        """Judge sessions as they are; gives the verdicts, by place, that there is room to find."""

    def verify(self) -> list[Verdict]:
        """Every session's verdict, in the order of places; one that goes on is judged as it is."""

    def close(self) -> None:
        """Give back what the sessions hold."""


class Here:
    """Sessions in this process. A session that cannot start is an infrastructure failure."""

    _alive: "weakref.WeakSet[Here]" = weakref.WeakSet()

    def __init__(self, timeout_s: float = 60.0) -> None:
        """`timeout_s`: what one session may take for a turn or its verdict."""
        self._timeout_s = timeout_s
        self._sessions: list[_Seat] = []
        self._alive.add(self)

    def start(self, tasks: Sequence[Task]) -> None:
        """Begin with these tasks; earlier sessions are closed."""
        self.start_with([(None, task) for task in tasks])

    def start_with(self, tasks: Sequence[tuple[Environment | None, Task]]) -> None:
        """Begin with tasks of these environments; None is the one that is registered."""
        self.close()
        self._sessions = [_Seat(environment, task, self._timeout_s) for environment, task in tasks]

    def begin_reply(self, turns: Turns) -> Replies:
        """What gives the answers; there is nobody else to work on them before it is asked."""
        return lambda: self.reply(turns)

    def reply(self, turns: Turns) -> dict[int, Reply]:
        """The answers to the assistant's messages at these places, by place.

        A turn given to a session that waits is played after those that it waits with.
        """
        for place, turn in turns.items():
            self._sessions[place].give(turn)
        return dict(answer_each(self._answer, turns))

    def end(self, places: Collection[int]) -> dict[int, Verdict]:
        """Judge these sessions as they are; gives the verdicts that there is room to find."""
        judged = [place for place in places if self._sessions[place].judge()]
        return {place: self._sessions[place].verdict for place in judged}

    def verify(self) -> list[Verdict]:
        """Every session's verdict; one that is not over is judged as it is."""
        left = [seat for seat in self._sessions if seat.verdict is None]
        while left:
            still = [seat for seat in left if not seat.judge()]
            if len(still) == len(left) and not self._make_room(left[0].judge):
                left[0].judge(wait=True)
            left = [seat for seat in still if seat.verdict is None]
        return [seat.verdict for seat in self._sessions]

    def close(self) -> None:
        """Give back what the sessions hold."""
        for seat in self._sessions:
            seat.close()
        self._sessions = []

    def _answer(self, place: int) -> Reply:
        seat = self._sessions[place]
        # A session that holds something goes on by its next turn. Where there is none, none does.
        if not seat.play() and not any(one.holds for one in self._sessions):
            if not self._make_room(seat.play):
                seat.play(wait=True)
        return seat.answer()

    def _make_room(self, step: Callable[[], bool]) -> bool:
        """Let other players' sessions in this process give back what they hold; whether a step
        is possible then. They play the same turns again when they are asked next."""
        for other in self._alive:
            if other is not self:
                for seat in other._sessions:
                    seat.begin_anew()
        return step()


# The name of a method of Players, or `learn`, and its argument.
Question = tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What players answer to a question, or why they cannot."""

    value: Any
    failure: str | None = None
    gone: bool = False  # whether they are not there any more


def answered(players: Players, question: str, values: Any) -> Answer:
    """What players answer to a question; `learn` gives them environments of the user's own."""
    try:
        ask = registry.unpack if question == "learn" else getattr(players, question)
        return Answer(ask() if values is None else ask(values))
    except Exception as error:  # a fault of the environments: their episodes do not count
        return Answer(None, f"an environment's worker failed: {error!r}")


def answer_each(answer: Callable[[int], Reply], places: Collection[int]) -> Iterator[tuple]:
    """Each place with its answer, those that wait again as long as others end."""
    left, ended = list(places), True
    while left and ended:
        waiting, ended = {}, False
        for place in left:
            reply = answer(place)
            if reply.waiting:
                waiting[place] = reply
            else:
                ended |= reply.verdict is not None
                yield place, reply
        left = list(waiting)
        if not ended:
            yield from waiting.items()


class _Seat:
    """One task, its session, and the turns that it has not played yet."""

    def __init__(self, environment: Environment | None, task: Task, timeout_s: float) -> None:
        self._environment, self._task, self._timeout_s = environment, task, timeout_s
        self.verdict: Verdict | None = None
        self._session: Session | None = None
        self._given: list[dict] = []  # every turn, the first `_played` of them played
        self._played = 0
        self._last: tuple[dict, ...] = ()  # what was said to the last of them
        self._start()

    @property
    def over(self) -> bool:
        return self._session is None

    @property
    def holds(self) -> bool:
        """Whether others wait for what it has."""
        return self._session is not None and self._session.holds

    def give(self, turn: dict | None) -> None:
        """Take a turn to be played after those that wait."""
        if turn is not None:
            self._given.append(turn)

    def answer(self) -> Reply:
        """The answer to the last turn given, if all are played."""
        waiting = self._session is not None and self._played < len(self._given)
        return Reply(() if waiting else self._last, self.over, waiting, self.verdict)

    def play(self, wait: bool = False) -> bool:
        """Play what was given as far as there is room; whether that was all. With `wait` there is
        room in the end, or the session is lost."""
        while self._session is not None and self._played < len(self._given):
            session, turn = self._session, Turn.of(self._given[self._played])
            if not session.ready(turn) and not (wait and self._wait(turn)):
                return self.over
            self._played += 1
            self._last = self._in_time(functools.partial(_replies, session, turn)) or ()
            if self._session is not None and session.over:
                self._judge()
        return True

    def judge(self, wait: bool = False) -> bool:
        """Find the verdict on what was given, if there is room for it; whether it is known."""
        if self.play(wait) and self._session is not None:
            if self._session.ready(None) or (wait and self._wait(None)):
                self._judge()
        return self.over

    def _wait(self, turn: Turn | None) -> bool:
        """Whether another thread of this process gave back the slot that an episode waits for."""
        ends = time.monotonic() + runner.WAIT_FOR_SLOT_S
        while time.monotonic() < ends:
            if self._session.ready(turn):
                return True
            time.sleep(_LOOK_EVERY_S)
        reason = f"no sandbox was free for {runner.WAIT_FOR_SLOT_S:.0f} s"
        self.verdict = Verdict(0.0, infra_error=reason)
        self.close()
        return False

    def begin_anew(self) -> None:
        """Give back what it holds; the same turns are played again when it is asked next."""
        if self.holds:
            self.close()
            self._played = 0
            self._start()

    def close(self) -> None:
        """End the session, judged or not."""
        if self._session is not None:
            session, self._session = self._session, None
            with contextlib.suppress(Exception):  # what is left of it is not the verdict's matter
                session.close()

    def _start(self) -> None:
        try:
            environment = self._environment or registry[self._task.environment]
            self._session = environment.start(self._task)
            self._session.turn_s = _FOR_CALLS * self._timeout_s
        except Exception as error:  # whatever keeps it from starting is not the model's fault
            self.verdict = failure(self._task, error)

    def _judge(self) -> None:
        found = self._in_time(self._session.verify)
        if isinstance(found, Verdict):
            self.verdict = sound_verdict(found)
        elif self.verdict is None:
            error = TypeError(f"verify gave {type(found).__name__}, which is no Verdict")
            self.verdict = failure(self._task, error)
        self.close()

    def _in_time(self, step: Callable[[], Any]) -> Any:
        """What a step gives; one that takes too long ends the episode with reward 0."""
        try:
            with time_limit(_FOR_ALL * self._timeout_s):
                return step()
        except OutOfTime:
            reason = self._session.infra_error
            self.verdict = Verdict(0.0, {"out_of_time": 1.0}, infra_error=reason)
        except Exception as error:  # of somebody's own session: the others go on
            self.verdict = failure(self._task, error)
        self.close()
        return None


def _replies(session: Session, turn: Turn) -> tuple:
    return tuple(sound_value(session.reply(turn) or ()))  # which a worker can send


def failure(task: Task, error: Exception) -> Verdict:
    """The verdict on an episode whose session failed, in a text that can be written down."""
    return Verdict(0.0, infra_error=sound_text(f"{task.environment}: {error!r}"[:_MAX_REASON]))


def sound_verdict(verdict: Verdict) -> Verdict:
    """A verdict of anybody's environment, with a reason that can be shown and parts to look up."""
    reason = verdict.infra_error
    reason = None if reason is None else sound_text(str(reason))[:_MAX_REASON] or "no reason given"
    parts = verdict.parts if isinstance(verdict.parts, dict) else {}
    answer = sound_value(verdict.answer)
    return dataclasses.replace(verdict, infra_error=reason, parts=parts, answer=answer)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs here for longer, in the main thread; no limit in others.

    An alarm that somebody else has set goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*unused: object) -> None:
        raise OutOfTime

    handler, began = signal.signal(signal.SIGALRM, late), time.monotonic()
    # Again each second after: a tool may have caught the first by a bare `except`.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:
            left = max(left - (time.monotonic() - began), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
