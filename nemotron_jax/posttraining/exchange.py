"""One question to an HTTP server and its reply, both JSON, within a time and a size."""

import contextlib
import functools
import http.client
import json
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

# Bytes of a reply that are read. The longest that is asked for, 16,384 tokens, takes about 100 kB.
MAX_BYTES = 2 * 2**20


class ExchangeError(Exception):
    """No reply that can be used; its text says why."""


def post_json(
    url: str, body: Any, *, timeout_s: float, headers: Mapping[str, str] | None = None
) -> Any:
    """The reply of a server to a POST.

    Raises ExchangeError for whatever else comes: no connection, another status than 2xx (a redirect
    is not followed), a reply that breaks off, is longer than MAX_BYTES, is not whole `timeout_s`
    after the question, however steadily it drips, or is no JSON.
    """
    call = _Call()
    opener = urllib.request.OpenerDirector()  # without what follows redirects
    for handler in (
        urllib.request.ProxyHandler(),
        _Secure(call) if url.startswith("https:") else _Plain(call),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    headers = {"Content-Type": "application/json", **(headers or {})}
    timer = threading.Timer(timeout_s, call.hang_up)
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with opener.open(request, timeout=timeout_s) as reply:
            return json.loads(_whole(reply))
    except urllib.error.HTTPError as error:
        reason = f"HTTP status {error.code}: {_said(error)}"
    except Exception as error:  # of a hundred kinds: nothing that a server says may end a run
        reason = f"{type(error).__name__}: {error}"[:200]
    finally:
        timer.cancel()
    if call.late:
        reason = f"no whole reply within {timeout_s:g} s"
    raise ExchangeError(reason)


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of an error, such as that it has no model of a name."""
    with error:
        try:
            return error.read1(200).decode(errors="replace")
        except Exception:  # that it says no more
            return ""


def _whole(reply: http.client.HTTPResponse) -> bytes:
    parts, size = [], 0
    while part := reply.read1(2**16):
        size += len(part)
        if size > MAX_BYTES:
            raise ValueError(f"a reply of more than {MAX_BYTES} bytes")
        parts.append(part)
    if reply.length:  # read1 does not tell a broken connection from an end
        raise http.client.IncompleteRead(b"", reply.length)
    return b"".join(parts)


class _Call:
    """The connections of one exchange, so that another thread can cut them.

    A socket's own timeout is one of each read: a server that sends a byte now and then never
    reaches it.
    """

    def __init__(self) -> None:
        self.late = False
        self._sockets: list[socket.socket] = []

    def hang_up(self) -> None:
        self.late = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def connected(self, one: socket.socket) -> None:
        self._sockets.append(one)
        if self.late:
            raise TimeoutError

    def kind(self, base: type[http.client.HTTPConnection]) -> Callable[..., Any]:
        """Connections that this call can cut."""
        call = self

        class Connection(base):
            def connect(self) -> None:
                super().connect()
                call.connected(self.sock)

        return Connection


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, call: _Call) -> None:
        super().__init__()
        self._kind = call.kind(http.client.HTTPConnection)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._kind, request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, call: _Call) -> None:
        super().__init__(context=_context())
        self._kind = call.kind(http.client.HTTPSConnection)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._kind, request, context=_context())


@functools.cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads every certificate: once is enough
