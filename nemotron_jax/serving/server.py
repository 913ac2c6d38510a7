"""The server's process: one socket, signals that let what runs end, a log that stops nobody."""

import logging
import logging.handlers
import queue
import socket
import sys
from types import FrameType

import uvicorn

from nemotron_jax.serving.app import LOG, make_app
from nemotron_jax.serving.driver import Driver
from nemotron_jax.serving.http import HEAD_BYTES, Connection

# Seconds that clients have to read the rest of their answers once all are written.
_GRACE_S = 30


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; ValueError where it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"--host={host} --port={port}: {error.strerror}; name another, or --port=0 for any"
        ) from None


def run(
    driver: Driver, listener: socket.socket, name: str, *, max_body: int, keys: tuple[str, ...]
) -> None:
    """Serve until a signal says to end, or the driver cannot begin."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    with _log():
        app = make_app(
            driver,
            on_ready=lambda: print(f"serving {name} on http://{host}:{port}", flush=True),
            on_failure=lambda: setattr(server, "should_exit", True),
            max_body=max_body,
            keys=keys,
        )
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=2048,
            timeout_graceful_shutdown=_GRACE_S,
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
        server = _Server(config, driver)
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """A signal lets what runs end, a second one does not."""

    def __init__(self, config: uvicorn.Config, driver: Driver) -> None:
        super().__init__(config)
        self._driver = driver

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end."""
        if self._driver.draining or not self._driver.ready:
            self.should_exit = self.force_exit = True
        self._driver.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to end."""
        if self._driver.draining and not self._driver.in_flight:
            self.should_exit = True
        return await super().on_tick(counter)


class _log:  # noqa: N801  (a context, as contextlib's are named)
    """The request log on stderr, written by a thread of its own: a full pipe holds up nobody."""

    def __enter__(self) -> None:
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        writer = logging.StreamHandler(sys.stderr)
        writer.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._handler = logging.handlers.QueueHandler(lines)
        self._listener = logging.handlers.QueueListener(lines, writer)
        self._listener.start()
        LOG.addHandler(self._handler)
        LOG.setLevel(logging.INFO)
        LOG.propagate = False

    def __exit__(self, *_: object) -> None:
        LOG.removeHandler(self._handler)
        self._listener.stop()
