"""The server's process: one socket, and signals that let what runs end."""

import asyncio
import socket
from types import FrameType

import uvicorn

from nemotron_jax.serving.app import make_app
from nemotron_jax.serving.driver import Driver
from nemotron_jax.serving.http import HEAD_BYTES, Connection
from nemotron_jax.serving.log import LOG, log_to_stderr

# Seconds that clients have to read the rest of their answers once all are written.
_GRACE_S = 30
_FORCED_S = 1  # that requests, and the engine's step, have to end after a second signal


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
    with log_to_stderr():
        LOG.info("loading %s; until it is ready /health answers 503", name)
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
        if not self._driver.ready:
            self.should_exit = True
        elif self._driver.draining:
            self.should_exit = self.force_exit = True
            self._driver.end_s = _FORCED_S
        self._driver.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs end, for as long as it may take; then end the application, which else would
        be found still running, and shown with a traceback."""
        late = asyncio.get_running_loop().call_later(_GRACE_S, self._cut_off)
        await super().shutdown(sockets)
        late.cancel()
        if self.force_exit:
            self._cut_off()
            if tasks := set(self.server_state.tasks):
                await asyncio.wait(tasks, timeout=_FORCED_S)
            await self.lifespan.shutdown()

    def _cut_off(self) -> None:
        """Let all clients be gone."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to end."""
        if self._driver.draining and not self._driver.in_flight:
            self.should_exit = True
        return await super().on_tick(counter)
