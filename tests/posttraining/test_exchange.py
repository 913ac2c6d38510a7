"""Whatever a server does, an exchange ends in time: in JSON, or in a reason."""

import gzip
import socket
import threading
import time

import pytest

from nemotron_jax.posttraining import exchange
from nemotron_jax.posttraining.exchange import ExchangeError, post_json


class Server:
    """Sends the same bytes to whoever connects, then hangs up; `pause` seconds between bytes."""

    def __init__(self, answer: bytes, pause: float = 0.0) -> None:
        self._answer, self._pause = answer, pause
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            connection, _ = self._socket.accept()
            with connection:
                while not connection.recv(65536).endswith(b"}"):
                    pass
                if not self._pause:
                    connection.sendall(self._answer)
                for place in range(len(self._answer) if self._pause else 0):
                    connection.sendall(self._answer[place : place + 1])
                    time.sleep(self._pause)
        except OSError:
            pass

    def close(self) -> None:
        self._socket.close()


def asked(answer: bytes, timeout_s: float = 10.0, pause: float = 0.0):
    server = Server(answer, pause)
    try:
        return post_json(server.url, {"question": 1}, timeout_s=timeout_s)
    finally:
        server.close()


def reply(body: bytes, head: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), head, body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        reply(b'{"a": 1}'),
        CHUNKED + b'4\r\n{"a"\r\n4\r\n: 1}\r\n0\r\n\r\n',
        b'HTTP/1.0 200 OK\r\n\r\n{"a": 1}',
    ],
)
def test_a_whole_reply_is_its_json(answer) -> None:
    assert asked(answer) == {"a": 1}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "without response"),
        (b"garbage\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 404 X\r\nContent-Length: 8\r\n\r\nno model", "HTTP status 404: no model"),
        (b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\nzz", "HTTP status 500: "),
        (b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "HTTP status 302"),
        (b"HTTP/1.1 307 X\r\nLocation: file:///etc/hosts\r\n\r\n", "HTTP status 307"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"a": 1}', "IncompleteRead"),
        (CHUNKED + b'50\r\n{"a": 1}', "IncompleteRead"),
        (CHUNKED + b"zz\r\n{}", "ValueError|IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "LineTooLong"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200 + b"\r\n", "headers"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n<html>", "JSONDecodeError"),
        (b"HTTP/1.1 204 OK\r\n\r\n", "JSONDecodeError"),
        (reply(b"<html>"), "JSONDecodeError"),
        (reply(b'"\xe9"'), "UnicodeDecodeError"),
        (reply(b"[" * 100_000), "RecursionError"),
        (reply(b"1" * 5000), "ValueError"),
        (reply(gzip.compress(b"{}", mtime=0), b"Content-Encoding: gzip\r\n"), "DecodeError"),
    ],
)
def test_whatever_else_comes_is_a_reason(answer, reason) -> None:
    with pytest.raises(ExchangeError, match=reason):
        asked(answer)


def test_no_more_is_read_than_a_verdict_takes(monkeypatch) -> None:
    monkeypatch.setattr(exchange, "MAX_BYTES", 1000)
    assert asked(reply(b"1" + b" " * 999)) == 1
    for answer in (reply(b"1" + b" " * 1000), b"HTTP/1.0 200 OK\r\n\r\n1" + b" " * 10**6):
        with pytest.raises(ExchangeError, match="more than 1000 bytes"):
            asked(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        reply(b" " * 40),
        CHUNKED + b"0" * 40,
    ],
)
def test_a_reply_that_drips_ends_in_time(answer) -> None:
    began = time.monotonic()
    with pytest.raises(ExchangeError, match=r"no whole reply within 0\.3 s"):
        asked(answer, timeout_s=0.3, pause=0.05)
    assert time.monotonic() - began < 2  # byte by byte it would take longer


def test_nobody_there_is_a_reason() -> None:
    with pytest.raises(ExchangeError, match="refused"):
        post_json("http://127.0.0.1:1/v1", {}, timeout_s=5)
    with pytest.raises(ExchangeError):
        post_json("http://no.such.host.invalid:x/v1", {}, timeout_s=5)
