"""Sessions of environments with workers of their own, which may die or hang without harm."""

import atexit
import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.environments.base import Task, Verdict
from nemotron_jax.posttraining.players import Here, Players, Replies, Reply

_STOPS = (signal.SIGTERM, signal.SIGINT)


class Worker(Protocol):
    """A place where sessions live, which answers one question at a time."""

    def ask(self, question: tuple[str, Any]) -> None: ...

    def answer(self, seconds: float) -> tuple[Any, str | None]: ...

    def end(self) -> None: ...


def make_players(config: RolloutConfig) -> Players:
    """What a config plays with: this process, others beside it, or actors of a Ray cluster."""
    if not config.workers:
        return Here()
    if config.worker_kind == "processes":
        return Workers(config.workers, config.timeout_s)
    from nemotron_jax.posttraining.ray_workers import RayWorker  # an optional package

    return Workers(config.workers, config.timeout_s, begin=RayWorker)


class Workers:
    """Sessions dealt out over workers. Place p lives with worker p modulo their number.

    A worker that ends or does not answer within `timeout_s` is killed and replaced; its sessions
    are lost, and their verdicts are infrastructure failures, not zeros.
    """

    def __init__(
        self,
        count: int,
        timeout_s: float,
        make: Callable[[], Players] = Here,
        begin: Callable[[Callable[[], Players]], Worker] | None = None,
    ) -> None:
        """`make` gives what each worker plays with, and is sent there by name; `begin` makes a
        worker, by default a process of this machine."""
        self._timeout_s, self._make = timeout_s, make
        self._begin = begin or Process
        self._workers = [self._begin(make) for _ in range(count)]
        self._lost: dict[int, str] = {}  # by place, why its session is gone
        self._count = 0
        self.replaced = 0

    def start(self, tasks: Sequence[Task]) -> None:
        """Begin with these tasks; earlier sessions are closed."""
        self._lost, self._count = {}, len(tasks)
        parts = {w: [tasks[p] for p in self._places(w)] for w in range(len(self._workers))}
        self._ask({w: ("start", part) for w, part in parts.items() if part})

    def begin_reply(self, turns: dict[int, dict[str, Any]]) -> Replies:
        """Let the workers answer the assistant's messages at these places; gives what waits for
        them. A lost session is over."""
        parts: dict[int, dict[int, dict]] = {}
        for place, turn in turns.items():
            if place not in self._lost:
                worker, inner = self._home(place)
                parts.setdefault(worker, {})[inner] = turn
        self._put({w: ("reply", part) for w, part in parts.items()})

        def wait() -> dict[int, Reply]:
            answers = self._take(parts)
            found = dict.fromkeys(turns, Reply((), over=True))
            for place in turns:
                worker, inner = self._home(place)
                if place not in self._lost:
                    found[place] = answers[worker][inner]
            return found

        return wait

    def reply(self, turns: dict[int, dict[str, Any]]) -> dict[int, Reply]:
        """The answers to the assistant's messages at these places; a lost session is over."""
        return self.begin_reply(turns)()

    def verify(self) -> list[Verdict]:
        """Every session's verdict."""
        wanted = range(min(len(self._workers), self._count))
        alive = [w for w in wanted if any(p not in self._lost for p in self._places(w))]
        answers = self._ask({w: ("verify", None) for w in alive})
        verdicts = []
        for place in range(self._count):
            worker, inner = self._home(place)
            lost = self._lost.get(place)
            verdicts.append(
                answers[worker][inner] if lost is None else Verdict(0.0, infra_error=lost)
            )
        return verdicts

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _home(self, place: int) -> tuple[int, int]:
        return place % len(self._workers), place // len(self._workers)

    def _places(self, worker: int) -> range:
        return range(worker, self._count, len(self._workers))

    def _ask(self, questions: dict[int, tuple[str, Any]]) -> dict[int, Any]:
        self._put(questions)
        return self._take(questions)

    def _put(self, questions: dict[int, tuple[str, Any]]) -> None:
        for worker, question in questions.items():
            self._workers[worker].ask(question)

    def _take(self, asked: Collection[int]) -> dict[int, Any]:
        """The answers of the workers, which work at the same time; one that fails is replaced."""
        deadline, answers = time.monotonic() + self._timeout_s, {}
        for worker in asked:
            answer, failure = self._workers[worker].answer(deadline - time.monotonic())
            if failure is None:
                answers[worker] = answer
                continue
            self._lost |= dict.fromkeys(self._places(worker), failure)
            self._workers[worker].end()
            self._workers[worker] = self._begin(self._make)
            self.replaced += 1
        return answers


class Process:
    """A worker that is a process of this machine, and the pipe to it.

    It is started afresh, not forked, so that it inherits neither the accelerator nor threads.
    """

    def __init__(self, make: Callable[[], Players]) -> None:
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

    def ask(self, question: tuple[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has died: `answer` finds that out
            self._pipe.send(question)

    def answer(self, seconds: float) -> tuple[Any, str | None]:
        """What came back, or why nothing did."""
        try:
            if not self._pipe.poll(max(seconds, 0.0)):
                return None, "an environment's worker did not answer in time"
            answer, failure = self._pipe.recv()
        except (EOFError, OSError):
            return None, f"an environment's worker ended (exit code {self._process.exitcode})"
        return answer, failure

    def end(self) -> None:
        atexit.unregister(self._process.kill)
        self._process.kill()
        self._process.join()
        self._pipe.close()


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
            question, values = pipe.recv()
            pipe.send(answered(players, question, values))
        except (EOFError, OSError):  # the run has ended, by a kill or otherwise
            players.close()
            return


def answered(players: Players, question: str, values: Any) -> tuple[Any, str | None]:
    """What players answer to a question by the name of their method, or why they cannot."""
    try:
        ask = getattr(players, question)
        return (ask() if values is None else ask(values)), None
    except Exception as error:  # a fault of the environments: their episodes do not count
        return None, f"an environment's worker failed: {error!r}"
