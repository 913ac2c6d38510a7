"""What the endpoints do with a connection: bodies within bounds, keys, events, departures."""

import asyncio
import concurrent.futures
import hmac
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import h11
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemotron_jax.host import give_back_freed_memory
from nemotron_jax.serving.answers import Answer
from nemotron_jax.serving.driver import Stream
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.refusal import Refusal

# Seconds in which a client has to send the whole of a request, from when it connects or begins a
# further one; the body has one more for every so many bytes that came. A slow line may take its
# time, one that only drips may not.
REQUEST_S = 4
BYTES_A_SECOND = 100_000
# Of them for a body whose head came late, from a connection that was opened in advance.
_BODY_S = 1
HEAD_BYTES = 32 << 10  # of a request's head
# Of bodies that are read or parsed at the same time: the large ones share room for so many of the
# largest, whatever else a small one finds a place.
_LARGE_BODIES, _SMALL_BODY = 32, 64 << 10
_TIDY_S = 1.0  # seconds after a large body until freed memory is given back, that of others too
_BEGAN = "nemotron_jax.began"  # of a scope: when the request began, by the loop's clock


class JsonResponse(Response):
    """An object as JSON, with characters as themselves."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes that are sent."""
        return json.dumps(content, ensure_ascii=False).encode()


class Events(StreamingResponse):
    """An answer as server-sent events, those of a round at once; the stream is closed in any
    case."""

    def __init__(self, answer: Answer, stream: Stream) -> None:
        super().__init__(_events(answer, stream), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self._at_end = stream.close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, until the end or until the client has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _events(answer: Answer, stream: Stream) -> AsyncIterator[bytes]:
    try:
        async for objects in answer.chunks(stream):
            yield b"".join(map(_event, objects))
    except Refusal as refusal:  # the status has been sent
        yield _event(answer.failed(refusal))
    yield answer.end


def _event(value: dict[str, Any]) -> bytes:
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class Room:
    """Bytes that are left for large bodies, of at most `most` bytes each, and the thread that
    parses them; for the loop's thread.

    They have one thread, as they would take turns in any case, and glibc keeps for each thread that
    frees large blocks tens of megabytes. What it keeps for all goes back to the system soon.
    """

    def __init__(self, most: int) -> None:
        self.most, self._left = most, _LARGE_BODIES * most
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "large")
        self._tidying: asyncio.Task[None] | None = None

    def take(self, bytes_: int) -> None:
        """Some more of a large body; Refusal where no room is left for it."""
        if bytes_ > self._left:
            reason = "too many large bodies come at the same time; try again later"
            raise Refusal(reason, status=429, code="queue_full")
        self._left -= bytes_

    def free(self, taken: int) -> None:
        """A body is done with that took so many."""
        self._left += taken
        if taken and (self._tidying is None or self._tidying.done()):
            self._tidying = asyncio.create_task(self._tidy())

    async def parsed(self, body: bytes) -> Fields:
        """What a body says."""
        threads = self._thread if len(body) > _SMALL_BODY else None
        found = await asyncio.get_running_loop().run_in_executor(threads, _parsed, body)
        del body
        if isinstance(found, Refusal):
            raise found
        return found

    async def _tidy(self) -> None:
        await asyncio.sleep(_TIDY_S)
        await asyncio.to_thread(give_back_freed_memory)


def _parsed(body: bytes) -> Fields | Refusal:
    """What a body says, or why it says nothing: without the frames in which that was found, which
    hold all of the body, and go when the collector comes."""
    try:
        return Fields.of(body)
    except Refusal as refusal:
        refusal.__context__ = None
        return refusal.with_traceback(None)


async def read_fields(request: Request, room: Room) -> Fields:
    """The object in a request's body, of at most `room.most` bytes, which come in time.

    It is parsed in another thread: a large one takes long.
    """
    most, taken = room.most, 0
    too_large = Refusal(f"the body is larger than {most} bytes; send less", status=413)
    said = request.headers.get("content-length", "")
    if said.isdigit() and (len(said) > 18 or int(said) > most):
        raise too_large
    body, now = bytearray(), asyncio.get_running_loop().time()
    end = max(request.scope.get(_BEGAN, now) + REQUEST_S, now + _BODY_S)
    try:
        async with asyncio.timeout_at(end) as limit:
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
                more = max(len(body) - _SMALL_BODY - taken, 0)
                room.take(more)
                taken += more
                limit.reschedule(end + len(body) / BYTES_A_SECOND)
        return await room.parsed(bytes(body))
    except TimeoutError:
        reason = f"the body came slower than {BYTES_A_SECOND} bytes a second"
        raise Refusal(reason, status=408) from None
    except ClientDisconnect:
        raise Refusal("the client went before all of the body had come", status=499) from None
    finally:
        body.clear()  # a refusal's frames hold it too
        room.free(taken)


def check_key(request: Request, keys: tuple[str, ...]) -> None:
    """Raise Refusal unless the client shows one of the keys, where there are any."""
    if not keys:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip().encode("utf-8", "replace")
    # All are compared: how long it takes says nothing about them.
    fits = [hmac.compare_digest(given, key.encode()) for key in keys]
    if kind.lower() != "bearer" or not any(fits):
        raise Refusal("no such API key; send `Authorization: Bearer KEY`", status=401)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work comes to; None, and the work is cancelled, where the client goes first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Connection(H11Protocol):
    """uvicorn's, which would wait for ever for the rest of a request that nobody answers."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin, and end if nothing whole comes in time."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take what came; a request that has begun has its time."""
        if self._late.cancelled():
            self._began = self.loop.time()
        before = self.scope
        super().data_received(data)
        if self.scope is not before:
            self.scope[_BEGAN] = self._began
        self._wait_or_not()

    def on_response_complete(self) -> None:
        """Go on; what is left of a body that nobody read has its time too."""
        super().on_response_complete()
        self._wait_or_not()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._late.cancel()
        super().connection_lost(exc)

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _halfway(self) -> bool:
        """Whether a part of a request has come."""
        return bool(self.conn.trailing_data[0]) or self.conn.their_state is h11.SEND_BODY

    def _wait_or_not(self) -> None:
        if self._answers or not self._halfway:
            self._late.cancel()
        elif self._late.cancelled():
            self._wait()

    def _wait(self) -> None:
        self._began = self.loop.time()
        self._late = self.loop.call_later(REQUEST_S, self._close_without_request)

    def _close_without_request(self) -> None:
        self._late.cancel()
        if not self._answers and not self.transport.is_closing():
            self.transport.close()
