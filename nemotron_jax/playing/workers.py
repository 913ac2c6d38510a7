"""Sessions of environments with workers of their own, which may die or hang without harm."""

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Task, Verdict
from nemotron_jax.environments.sandbox import divide_budget
from nemotron_jax.playing.players import (
    Answer,
    Here,
    Players,
    Question,
    Replies,
    Reply,
    Turns,
    answered,
)

_STOPS = (signal.SIGTERM, signal.SIGINT)
# What a new worker may take beside, on a busy machine: to import the environments before
# its first answer, and to start its sandbox for its first turn. Less, and it counts as hung.
_BIRTH_S, _SANDBOX_S = 60.0, 20.0


class Worker(Protocol):
    """A place where sessions live, which answers questions one after another."""

    began: bool  # whether it is at work on the question whose answer comes next

    def ask(self, questions: Sequence[Question]) -> None:
        """Hand over questions, which are answered in their order."""

    def answer(self, seconds: float) -> Answer:
        """The answer to the next question, waited for so long."""

    def end(self) -> None:
        """End the place with all that lives in it, whatever it is doing."""


def make_players(config: RolloutConfig) -> Players:
    """What a config plays with: this process, others beside it, or actors of a Ray cluster."""
    if not config.workers:
        return Here(config.timeout_s)
    if config.worker_kind == "processes":
        return Workers(config.workers, config.timeout_s)
    from nemotron_jax.playing.ray_workers import RayWorker  # an optional package

    return Workers(config.workers, config.timeout_s, begin=RayWorker)


@dataclasses.dataclass
class _Place:
    """What is known of a session without asking its worker."""

    task: Task
    told: list[dict] = dataclasses.field(default_factory=list)
    owed: int = 0  # turns whose answer has not come
    verdict: Verdict | None = None


class _Asked(NamedTuple):
    """A question that a worker has not answered, about one session or (None) about all."""

    place: int | None
    question: Question
    kept: bool = True  # whether somebody waits for the answer


class Workers:
    """Sessions dealt out over workers. Place p lives with worker p modulo their number.

    A worker that ends, or whose next answer does not come within `timeout_s`, is killed and
    replaced. The session that it was at work on is lost: its verdict is an infrastructure failure,
    not a zero. The worker's other sessions hear their turns again in the new one and go on.
    """

    def __init__(
        self,
        count: int,
        timeout_s: float,
        make: Callable[[], Players] | None = None,
        begin: Callable[[Callable[[], Players]], Worker] | None = None,
    ) -> None:
        """`make` gives what each worker plays with, and is sent there by name; `begin` makes a
        worker, by default a process of this machine."""
        self._timeout_s = timeout_s
        # This process plays too, what is held out.
        divide_budget(count + 1)
        self._make = _Made(make or functools.partial(Here, timeout_s), count + 1)
        self._begin = begin or Process
        self._workers = [self._begin(self._make) for _ in range(count)]
        self._new = set(range(count))  # workers that have not answered yet
        self._unused = set(range(count))  # those that have not answered a turn
        self._places: list[_Place] = []
        self._packed: bytes | None = None  # environments that workers cannot know
        self.replaced = 0

    def start(self, tasks: Sequence[Task]) -> None:
        """Begin with these tasks; earlier sessions are closed.

        Raises ValueError for an environment that cannot be sent to a worker.
        """
        self._places = [_Place(task) for task in tasks]
        self._packed = registry.packed({task.environment for task in tasks})
        used = range(min(len(self._workers), len(tasks)))
        self._take(self._put({worker: self._beginning(worker) for worker in used}))

    def begin_reply(self, turns: Turns) -> Replies:
        """Let the workers answer the assistant's messages at these places; gives what waits for
        them. A lost session is over."""
        asked = []
        for place, turn in turns.items():
            one = self._places[place]
            if one.verdict is None:
                one.told += [] if turn is None else [turn]
                one.owed += turn is not None
                asked.append(_Asked(place, ("reply", {self._inner(place): turn})))
        parts = self._put(self._by_worker(asked))

        def wait() -> dict[int, Reply]:
            found = self._replies(parts)
            over = lambda place: Reply((), over=True, verdict=self._places[place].verdict)
            return {place: found.get(place) or over(place) for place in turns}

        return wait

    def reply(self, turns: Turns) -> dict[int, Reply]:
        """The answers to the assistant's messages at these places; a lost session is over."""
        return self.begin_reply(turns)()

    def end(self, places: Collection[int]) -> dict[int, Verdict]:
        """Judge these sessions as they are; gives the verdicts that there is room to find."""
        left = [place for place in places if self._places[place].verdict is None]
        asked = [_Asked(place, ("end", [self._inner(place)])) for place in left]
        for place, verdict in self._take(self._put(self._by_worker(asked))).items():
            self._places[place].verdict = verdict
        return {p: v for p in places if (v := self._places[p].verdict) is not None}

    def verify(self) -> list[Verdict]:
        """Every session's verdict; one that is not over is judged as it is."""
        unknown = lambda: [p for p, one in enumerate(self._places) if one.verdict is None]
        left = unknown()
        while self.end(left):  # those that end make room for others
            left = unknown()
        homes = {place: self._home(place) for place in left}
        asked = {worker: [_Asked(None, ("verify", None))] for worker in homes.values()}
        found = self._take(self._put(asked))
        for place, worker in homes.items():
            if self._places[place].verdict is None:
                self._places[place].verdict = found[worker][self._inner(place)]
        return [one.verdict for one in self._places]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        divide_budget(1)

    def _home(self, place: int) -> int:
        return place % len(self._workers)

    def _inner(self, place: int) -> int:
        return place // len(self._workers)

    def _unknown(self, worker: int) -> list[int]:
        """The places of a worker whose verdict is not known."""
        places = range(worker, len(self._places), len(self._workers))
        return [place for place in places if self._places[place].verdict is None]

    def _by_worker(self, asked: Iterable[_Asked]) -> dict[int, list[_Asked]]:
        parts: dict[int, list[_Asked]] = {}
        for one in asked:
            parts.setdefault(self._home(one.place), []).append(one)
        return parts

    def _beginning(self, worker: int) -> list[_Asked]:
        tasks = [one.task for one in self._places[worker :: len(self._workers)]]
        known = [_Asked(None, ("learn", self._packed))] if self._packed else []
        return [*known, _Asked(None, ("start", tasks))]

    def _replies(self, parts: dict[int, list[_Asked]]) -> dict[int, Reply]:
        """The answers to turns, asked for again where a session waits and others have ended."""
        found: dict[int, Reply] = {}
        while parts:
            new = self._take(parts)
            for place, reply in new.items():
                one = self._places[place]
                one.owed = one.owed if reply.waiting else 0
                one.verdict = one.verdict or reply.verdict
            found |= new
            ended = {w for w, part in parts.items() if any(self._is_known(a) for a in part)}
            again = [p for p, reply in found.items() if reply.waiting and self._home(p) in ended]
            asked = [_Asked(place, ("reply", {self._inner(place): None})) for place in again]
            parts = self._put(self._by_worker(asked))
        return found

    def _is_known(self, asked: _Asked) -> bool:
        return asked.place is not None and self._places[asked.place].verdict is not None

    def _put(self, parts: dict[int, list[_Asked]]) -> dict[int, list[_Asked]]:
        for worker, part in parts.items():
            self._workers[worker].ask([one.question for one in part])
        return parts

    def _take(self, parts: dict[int, list[_Asked]]) -> dict[int, Any]:
        """The answers by place, or by worker where that was asked about all of its sessions.

        There is none about a session that was lost. Workers work at the same time; one that fails
        is replaced, and asked again for what it did not answer.
        """
        answers: dict[int, Any] = {}
        for worker, part in parts.items():
            left = list(part)
            while left:
                asked = left[0]
                answer = self._workers[worker].answer(self._seconds(worker, asked))
                if answer.gone:
                    left = self._begin_again(worker, left, answer.failure)
                    continue
                left.pop(0)
                self._new.discard(worker)
                if asked.place is not None:
                    self._unused.discard(worker)
                if answer.failure is not None:
                    self._lose(worker, asked.place, answer.failure)
                elif asked.kept:
                    found = answer.value
                    if asked.place is not None:
                        found = found.get(self._inner(asked.place))
                    answers[worker if asked.place is None else asked.place] = found
        return answers

    def _seconds(self, worker: int, asked: _Asked) -> float:
        """How long an answer may take: by the turns and verdicts that it has to wait for."""
        if asked.place is None:
            times = len(self._unknown(worker)) if asked.question[0] == "verify" else 1
        else:
            times = self._places[asked.place].owed
        more = _BIRTH_S * (worker in self._new) + _SANDBOX_S * (worker in self._unused)
        return self._timeout_s * max(times, 1) + more

    def _lose(self, worker: int, place: int | None, reason: str) -> None:
        for lost in self._unknown(worker) if place is None else [place]:
            self._places[lost].verdict = Verdict(0.0, infra_error=reason)

    def _begin_again(self, worker: int, left: list[_Asked], reason: str) -> list[_Asked]:
        """Replace a worker; gives what the new one is asked, up to what the old one owed."""
        # One that never said anything would fail again. What is not begun is played again.
        if self._workers[worker].began or worker in self._new:
            self._lose(worker, left[0].place, reason)
        self._workers[worker].end()
        self._workers[worker] = self._begin(self._make)
        self._new.add(worker)
        self._unused.add(worker)
        self.replaced += 1
        alive = self._unknown(worker)
        asked = [one._replace(kept=False) for one in self._beginning(worker)] if alive else []
        waited = {one.place for one in left if one.kept and one.question[0] == "reply"}
        for place in alive:
            one, inner = self._places[place], self._inner(place)
            one.owed = len(one.told)
            asked += [_Asked(place, ("reply", {inner: turn}), kept=False) for turn in one.told]
            if place in waited:
                asked[-1] = asked[-1]._replace(kept=True)
        others = [one for one in left if one.kept and one.question[0] != "reply"]
        asked += [one for one in others if not self._is_known(one)]
        self._put({worker: asked})
        return asked


class Process:
    """A worker that is a process of this machine, and the pipe to it.

    It is started afresh, not forked, so that it inherits neither the accelerator nor threads.
    """

    def __init__(self, make: Callable[[], Players]) -> None:
        self.began = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make), daemon=True)
        resource_tracker.ensure_running()  # where it starts, it lets these signals through again
        # It begins with these signals held back, until `serve` knows what to make of them.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # What multiprocessing sends at the end of this process, and waits for, is one of them.
        atexit.register(self._process.kill)
        theirs.close()

    def ask(self, questions: Sequence[Question]) -> None:
        """Send questions; one that has died is found out by `answer`."""
        with contextlib.suppress(OSError):  # it has died: `answer` finds that out
            self._pipe.send(list(questions))

    def answer(self, seconds: float) -> Answer:
        """What came back to the next question, or why nothing did."""
        ends = time.monotonic() + seconds
        try:
            while self._pipe.poll(max(ends - time.monotonic(), 0.0)):
                found = self._pipe.recv()
                self.began = found is None  # a word that the next question is begun
                if found is not None:
                    return found
        except (EOFError, OSError):
            self._process.join(_BIRTH_S)
            code = self._process.exitcode
            return Answer(None, f"an environment's worker ended (exit code {code})", gone=True)
        self.began = True
        return Answer(None, "an environment's worker did not answer in time", gone=True)

    def end(self) -> None:
        """Kill the process, whatever it is doing, and wait for its end."""
        atexit.unregister(self._process.kill)
        self._process.kill()
        self._process.join()
        self._pipe.close()


@dataclasses.dataclass(frozen=True)
class _Made:
    """What makes a worker's players, in the worker."""

    make: Callable[[], Players]
    parts: int  # processes that share the machine's memory for sandboxes

    def __call__(self) -> Players:
        divide_budget(self.parts)
        return self.make()


def serve(pipe: Connection, make: Callable[[], Players]) -> None:
    """What a worker's process runs: questions come in and answers go out until the pipe closes.

    Signals that stop a run reach its workers too, by a terminal's Ctrl-C or a scheduler. The run
    ends after its step, for which it needs their answers, so they heed the pipe alone.
    """
    for number in _STOPS:
        signal.signal(number, lambda *unused: None)  # not SIG_IGN: that would pass to children
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    players = make()
    while True:
        try:
            for question, values in pipe.recv():
                pipe.send(None)
                pipe.send(answered(players, question, values))
        except (EOFError, OSError):  # the run has ended, by a kill or otherwise
            players.close()
            return
