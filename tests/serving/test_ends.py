"""How a server's process ends, and that a log which nobody reads stops it neither before nor
then."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nemotron_jax.serving import log, server
from tests.serving.live import CHAT, TOKENIZER, live
from tests.serving.test_server import HELLO, chat_head, raw, until

ROOT = pathlib.Path(__file__).parents[2]
# The server's command around a generator that never ends a step, or one that is never made.
PROGRAM = """
import sys, time
from nemotron_jax import serve
from tests.serving.live import Live
def make(plan):
    if sys.argv[1] == "loading":
        print("loading", flush=True)
        time.sleep(600)
    one = Live(script="two" * 900)
    one.generator.pause_s = 0.05
    return one.generator, one.served()
serve._made = make
sys.exit(serve.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def process(folder: pathlib.Path, how: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process once it says something, and its address."""
    TOKENIZER.save(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--checkpoint={folder}", f"--port={port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, how, *flags], cwd=ROOT, **pipes) as one:
        try:
            assert re.fullmatch(r"(loading|serving .*)\n", one.stdout.readline())
            yield one, f"http://127.0.0.1:{port}"
        finally:
            one.kill()


@pytest.mark.more
def test_a_signal_while_it_loads_ends_it_at_once(tmp_path: pathlib.Path) -> None:
    with process(tmp_path, "loading") as (one, url), httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 503
        one.send_signal(signal.SIGINT)
        assert one.wait(20) == 0
        assert "Traceback" not in one.stderr.read()


@pytest.mark.more
def test_a_second_signal_ends_what_runs(tmp_path: pathlib.Path) -> None:
    with process(tmp_path, "serving") as (one, url), httpx.Client(base_url=url) as client:
        body = {**HELLO, "stream": True, "max_tokens": 2000}
        with client.stream("POST", CHAT, json=body) as answer:
            chunks = answer.iter_bytes()
            next(chunks)
            one.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(url + "/health").json()["status"] == "draining")
            next(chunks)  # what runs goes on
            one.send_signal(signal.SIGTERM)
            assert one.wait(20) == 0
            with contextlib.suppress(httpx.HTTPError):
                assert "[DONE]" not in b"".join(chunks).decode()
        assert "Traceback" not in one.stderr.read()


def test_who_never_reads_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bound = server.bound

    def small(*address: Any) -> socket.socket:
        """A socket whose connections hold little that nobody has read."""
        listener = bound(*address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(server, "bound", small)
    monkeypatch.setattr(server, "_GRACE_S", 0.3)
    with live(script="</think>" + "two" * 900) as one:
        one.generator.per_step = 50
        wanted = {"n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}
        body = json.dumps({**HELLO, **wanted}).encode()  # the answer has many megabytes
        head = chat_head(len(body)).replace("\n", "\r\n")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(one.address)
            client.sendall(head.encode() + body)
            until(lambda: len(one.generator.seen) == 8 and not one.driver.in_flight)
            one.driver.draining = True
            until(lambda: not one.driver.busy)
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_that_nobody_reads_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"a" * 4096):
            pass
    os.set_blocking(writing, True)
    monkeypatch.setattr(log, "_STDERR", writing)
    monkeypatch.setattr(log, "_MOST_WAITING", 20)
    try:
        with live() as one:
            for _ in range(30):
                with raw(one, "no HTTP\n\n") as connection:
                    assert b" 400 " in connection.recv(1000)
                assert one.post().status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 10  # nor does it wait for it at its end
    finally:
        os.close(reading)  # and who waits in it is told so
        os.close(writing)
