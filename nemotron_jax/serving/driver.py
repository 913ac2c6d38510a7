"""One thread owns the generator: jobs go to it by a queue, tokens come back round by round.

The event loop never waits for a step, and a client that reads slowly never holds one up: what it
has not taken yet waits in its own stream, of at most as many tokens as it asked for.
"""

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from nemotron_jax.decoding.generator import Generator, Stats
from nemotron_jax.decoding.request import Request
from nemotron_jax.serving.log import LOG
from nemotron_jax.serving.metrics import Metrics
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.wishes import Job

# Steps in a row that may fail before all requests are given up: an engine takes up again what a
# step lost, and what fails thrice will fail for ever.
_MOST_FAILURES = 3
_STATS_EVERY_S = 0.25  # counting takes a moment, and a scrape comes every few seconds


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a round gave one of a stream's continuations, and how that ended if it did."""

    index: int
    request: Request  # of which the prompt and the counts are read, no list that still grows
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[Sequence[tuple[int, float]]] = ()
    finish_reason: str | None = None
    error: str = ""  # why it could not go on


class Stream:
    """The continuations of one HTTP request, numbered through all its jobs; for the loop's thread
    alone."""

    def __init__(self, driver: "Driver", jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.count = sum(job.n for job in jobs)
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.began = time.monotonic()
        self.latest: dict[int, float] = {}  # when each continuation was given something
        self._driver = driver
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()
        self._left = self.count
        self._failure: Refusal | None = None
        self._closed = False

    async def rounds(self) -> AsyncIterator[list[Piece]]:
        """All that has come since the last time, until every continuation is over."""
        while self._left or self._pieces:
            await self._news.wait()
            self._news.clear()
            if self._failure is not None:
                raise self._failure
            pieces, self._pieces = self._pieces, []
            self._left -= sum(piece.finish_reason is not None for piece in pieces)
            if pieces:
                yield pieces

    def put(self, piece: Piece) -> None:
        """Keep a piece until it is taken."""
        if not self._closed:
            self._pieces.append(piece)
            self._news.set()

    def fail(self, failure: Refusal) -> None:
        """End it without an answer."""
        self._failure = failure
        self._news.set()

    def close(self) -> None:
        """Nobody reads on: what still runs is cancelled."""
        if not self._closed:
            self._closed, self._pieces = True, []
            if self._left:
                self._driver.cancel(self)


@dataclasses.dataclass
class _Live:
    """A request of the generator's and where its tokens go; for the driver's thread alone."""

    stream: Stream
    index: int
    given: int = 0


class Driver:
    """Runs a generator for an event loop.

    `make` makes the generator, in the driver's thread, and says what it serves. At most `most`
    continuations run or wait.
    """

    def __init__(self, make: Callable[[], tuple[Generator, Served]], *, most: int) -> None:
        self.most = most
        self.in_flight = 0  # continuations that are not over; the loop's
        self.draining = False
        self.end_s = 60.0  # seconds that its end waits for the step that it is in
        self.ready = False
        self.error: BaseException | None = None  # why there is no generator
        self.served: Served | None = None  # once it is ready
        self.stats: Stats | None = None
        self.metrics = Metrics()
        self._make = make
        self._inbox: collections.deque[Callable[[Generator], None]] = collections.deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._live: dict[Request, _Live] = {}
        self._failures = 0
        self._counted = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_ready: Callable[[], Any], on_failure: Callable[[], Any]) -> None:
        """Begin, in the running event loop; one of the two is called there."""
        self._loop = asyncio.get_running_loop()
        self._on_ready, self._on_failure = on_ready, on_failure
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether its thread still does something."""
        return self._thread.is_alive()

    def check_open(self) -> Served:
        """What is served; Refusal while nothing is."""
        if self.draining or not self.ready or self.served is None:
            reason = "is shutting down" if self.draining else "is loading the model"
            raise Refusal(f"the server {reason}", status=503)
        return self.served

    async def submit(self, jobs: Sequence[Job]) -> Stream:
        """A stream of what the jobs give; Refusal where they cannot run, or not now."""
        self.check_open()
        count = sum(job.n for job in jobs)
        if count > self.most:
            raise Refusal(f"n: {count} samples never run together; ask for {self.most}", "n")
        if self.in_flight + count > self.most:
            raise Refusal(
                f"{self.in_flight} requests run or wait, and the server takes {self.most}; try "
                "again later",
                status=429,
                code="queue_full",
            )
        stream = Stream(self, jobs)
        self.in_flight += count
        self._send(lambda generator: self._submit(generator, stream))
        try:
            await asyncio.shield(stream.accepted)
        except BaseException:
            stream.close()
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """End what a stream still waits for."""
        self._send(
            lambda _: [r.cancel() for r, live in self._live.items() if live.stream is stream]
        )

    async def stop(self) -> None:
        """Let the thread end after the step that it is in."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self.ready:  # one that still makes its generator ends with the process
            await asyncio.to_thread(self._thread.join, self.end_s)

    # In the loop's thread, called by the other one.

    def _begin(self) -> None:
        self.ready = True
        self._on_ready()

    def _refused(self, stream: Stream, error: Exception) -> None:
        self.in_flight -= stream.count
        stream._left = 0
        stream.accepted.set_exception(error)
        stream.accepted.exception()  # a client that has gone does not ask for it

    def _hand_out(self, batch: Sequence[tuple[Stream, Piece]]) -> None:
        now = time.monotonic()
        for stream, piece in batch:
            self.in_flight -= piece.finish_reason is not None
            if piece.tokens:
                before = stream.latest.get(piece.index)
                stream.latest[piece.index] = now
                self.metrics.given(now, stream.began, before, len(piece.tokens))
            if piece.error:  # a grammar beyond its limits: what there is of a text fits nothing
                reason = f"the answer could not be held to its format: {piece.error[:200]}"
                stream.fail(Refusal(reason, "response_format"))
            else:
                stream.put(piece)

    def _gave_up(self, streams: Sequence[Stream], finished: int) -> None:
        self.in_flight -= finished
        for stream in streams:
            stream.fail(Refusal("the server failed at this request; try again", status=500))

    # In the driver's own thread.

    def _run(self) -> None:
        try:
            generator, self.served = self._make()
            self.stats = generator.stats()
        except BaseException as error:
            self.error = error
            self._tell(self._on_failure)
            return
        self._make = None
        self._tell(self._begin)
        while (commands := self._commands()) is not None:
            for command in commands:
                command(generator)
            if self._live:
                self._step(generator)
            self._count(generator)

    def _commands(self) -> list[Callable[[Generator], None]] | None:
        """What has been sent, once there is something to do; None at the end."""
        with self._wake:
            while not (self._inbox or self._live or self._stopped):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            return None if self._stopped else commands

    def _submit(self, generator: Generator, stream: Stream) -> None:
        requests: list[Request] = []
        try:
            for job in stream.jobs:
                requests += generator.submit(job.prompt, job.wanted, n=job.n)
        except Exception as error:
            for request in requests:  # that of another prompt of the same body
                request.cancel()
            known = isinstance(error, ValueError)
            if not known:
                LOG.exception("a request could not be begun")
            reason = str(error) if known else "the server failed at this request"
            self._tell(self._refused, stream, Refusal(reason, status=400 if known else 500))
            return
        self._live |= {request: _Live(stream, i) for i, request in enumerate(requests)}
        self._tell(lambda: stream.accepted.done() or stream.accepted.set_result(None))

    def _step(self, generator: Generator) -> None:
        try:
            generator.step()
            self._failures = 0
        except Exception:
            LOG.exception("a step failed")
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                self._give_up()
            return
        batch = []
        for request, live in list(self._live.items()):
            end, reason = len(request.tokens), request.finish_reason
            if end == live.given and reason is None:
                continue
            new = slice(live.given, end)
            top = request.top_logprobs[new]
            piece = (request.tokens[new], request.logprobs[new], top, reason, request.error)
            batch.append((live.stream, Piece(live.index, request, *piece)))
            live.given = end
            if reason is not None:
                del self._live[request]
        if batch:
            self._tell(self._hand_out, batch)

    def _give_up(self) -> None:
        """Answer everybody that it failed; what was begun is cancelled."""
        for request in self._live:
            request.cancel()
        streams = list({id(live.stream): live.stream for live in self._live.values()}.values())
        self._tell(self._gave_up, streams, len(self._live))
        self._live, self._failures = {}, 0

    def _count(self, generator: Generator) -> None:
        now = time.monotonic()
        if not self._live or now - self._counted > _STATS_EVERY_S:
            self.stats, self._counted = generator.stats(), now

    def _send(self, command: Callable[[Generator], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _tell(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop has ended, and nobody listens
            self._stopped = True
