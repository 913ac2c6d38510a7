"""The near end of one sandbox: its pipes, its clock, and what comes back from it."""

import contextlib
import errno
import json
import os
import selectors
import socket
import time
from typing import Protocol

from nemotron_jax.environments.sandbox.limits import Limits, Result

START_S = 30.0  # from an order to the shim's first byte
MOST_REPLY_BYTES = 16 << 20  # a snapshot of 4 MiB in base64, or a cell's output, with room
REPORT_S = 20.0  # from a sandbox's end to the launcher's word about it


class Orders(Protocol):
    """What a run needs of the Sandbox that it is in."""

    def tasks(self, limits: Limits) -> int | None:
        """The limit on processes and threads, None where only fork is denied."""

    def order(self, slot: int, limits: Limits, handles: list[int]) -> None:
        """Ask the launcher for one sandbox with these descriptors."""


class Slots(Orders, Protocol):
    """What a session needs of it: a slot of its own, too."""

    def take(self, limits: Limits) -> int:
        """A slot with its memory reserved. Raises OSError when none is free for long."""

    def give_back(self, slot: int, limits: Limits) -> None:
        """Free what `take` gave."""


class Run:
    """One sandbox from its start to its end; a context manager, so that it ends for certain."""

    def __init__(
        self, sandbox: Orders, slot: int, limits: Limits, request: dict, files: dict
    ) -> None:
        self.limits = limits
        self.killed = ""
        self.started = time.monotonic()
        self.buffers = {"stdout": b"", "stderr": b""}
        self.report = b""
        self.channel, channel = socket.socketpair()
        self.control, control = socket.socketpair()
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        contents = {path: _bytes(content) for path, content in files.items()}
        _check_paths(contents)
        request = dict(
            request,
            files=contents,
            tasks=sandbox.tasks(limits),
            output=limits.output_bytes,
        )
        self.to_channel = frame(request)
        try:
            handles = [channel.fileno(), stdin, stdout, stderr, control.fileno()]
            sandbox.order(slot, limits, handles)
        except BaseException:
            self.report = b"{}"  # the launcher knows nothing of it, so none will come
            self.__exit__()
            raise
        finally:
            for near in (channel, control):
                near.close()
            for handle in (stdin, stdout, stderr):
                os.close(handle)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.stop_input()
        for name in ("stdout", "stderr"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
        if not self.report:  # closing our half kills; the report says that it is done
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_WR)
                self.control.settimeout(REPORT_S)
                self.report = self.control.recv(4096)
        self.control.close()

    def stop_input(self) -> None:
        """Close the code's standard input."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def begin(self) -> str | None:
        """Hand over the request and wait for the shim; the reason when it does not come up."""
        self.channel.settimeout(START_S)
        try:
            self.channel.sendall(self.to_channel)
            ready = self.channel.recv(1)
        except OSError as error:
            ready, reason = b"", str(error)
        else:
            reason = "it ended before its code began"
        if ready == b"R":
            self.started = time.monotonic()
            return None
        with contextlib.suppress(OSError):
            os.set_blocking(self.stderr, False)
            reason += ": " + os.read(self.stderr, 2000).decode("utf-8", "replace").strip()
        with contextlib.suppress(OSError):
            self.control.settimeout(0.5)
            self.report = self.control.recv(4096)
            reason += " " + self.report.decode()
        return f"sandbox: {reason}"

    def finish(self, stdin: bytes) -> Result:
        """Feed the code, collect its output, and wait for its end or make it end."""
        if reason := self.begin():
            return Result("", "", -1, "exit", 0.0, reason)
        deadline = self.started + self.limits.wall_s
        with selectors.DefaultSelector() as selector:
            self._watch(selector, bool(stdin))
            while not self.report:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    stdin = self._serve(selector, key.data, stdin)
                if not self.killed and time.monotonic() >= deadline:
                    self._kill("wall")
                if self.killed:
                    deadline = time.monotonic() + REPORT_S
                    self.control.settimeout(REPORT_S)
                    self.report = self.report or self.control.recv(4096) or b"{}"
        for name in ("stdout", "stderr"):
            while self._read(name):
                pass
        return self._result()

    def _watch(self, selector: selectors.BaseSelector, feeds: bool) -> None:
        for name in ("stdout", "stderr"):
            os.set_blocking(getattr(self, name), False)
            selector.register(getattr(self, name), selectors.EVENT_READ, name)
        selector.register(self.control, selectors.EVENT_READ, "control")
        if feeds:
            os.set_blocking(self.stdin, False)
            selector.register(self.stdin, selectors.EVENT_WRITE, "stdin")
        else:
            self.stop_input()

    def _serve(self, selector: selectors.BaseSelector, what: str, stdin: bytes) -> bytes:
        """Do what one descriptor is ready for; returns the input that is still to be written."""
        if what == "control":
            self.report = self.control.recv(4096) or b"{}"
        elif what == "stdin":
            try:
                stdin = stdin[os.write(self.stdin, stdin[:65536]) :]
            except BlockingIOError:
                return stdin
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                stdin = b""  # the code does not read all of it
            if not stdin:
                selector.unregister(self.stdin)
                self.stop_input()
        elif not self._read(what):
            selector.unregister(getattr(self, what))
        elif len(self.buffers[what]) > self.limits.output_bytes:
            self._kill("output")
        return stdin

    def _read(self, name: str) -> bool:
        """Read what there is of an output; False at its end and once the limit is passed."""
        if len(self.buffers[name]) > self.limits.output_bytes:
            return False
        try:
            part = os.read(getattr(self, name), 65536)
        except BlockingIOError:
            return False
        self.buffers[name] += part
        return bool(part)

    def _kill(self, why: str) -> None:
        if not self.killed:
            self.killed = why
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_WR)

    def _result(self) -> Result:
        report = json.loads(self.report)
        most = self.limits.output_bytes
        out, err = (self.buffers[n][:most].decode("utf-8", "replace") for n in ("stdout", "stderr"))
        seconds = time.monotonic() - self.started
        if "code" not in report:
            reason = report.get("error", "the launcher died")
            return Result(out, err, -1, "exit", seconds, f"sandbox: {reason}")
        over = max(map(len, self.buffers.values())) > most
        launcher = report["killed"] if report["killed"] in ("scratch", "wall") else ""
        ended = self.killed or launcher or ("output" if over else "exit")
        return Result(out, err, report["code"], ended, seconds)


class Session:
    """A sandbox that lives over several requests; a context manager."""

    mode = ""

    def __init__(
        self,
        sandbox: Slots,
        *,
        limits: Limits,
        files: dict[str, str | bytes] | None = None,
        slot: int | None = None,
    ) -> None:
        """Start it, in a `slot` that the caller took and gives back, or in one of its own. Raises
        OSError where the sandbox fails."""
        self._sandbox, self._limits, self._owns = sandbox, limits, slot is None
        self._slot = sandbox.take(limits) if slot is None else slot
        self._run = None
        try:
            request = {"mode": self.mode}
            self._run = Run(sandbox, self._slot, limits, request, files or {})
            if reason := self._run.begin():
                raise OSError(reason)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether it still takes requests."""
        return self._slot is not None

    def ask(self, request: dict, wall_s: float) -> dict | None:
        """The reply to one request; None, and the end of the session, when none comes in time."""
        if self._run is None or self._slot is None:
            return None
        try:
            channel = self._run.channel
            channel.settimeout(wall_s)
            channel.sendall(frame(request))
            deadline = time.monotonic() + wall_s
            size = int(_exactly(channel, 8, deadline), 16)
            if size <= MOST_REPLY_BYTES:
                reply = json.loads(_exactly(channel, size, deadline))
                if isinstance(reply, dict):
                    return reply
        except (OSError, ValueError, RecursionError):
            pass
        self.close()
        return None

    def close(self) -> None:
        """End it; nothing of it is left afterwards."""
        if self._slot is None:
            return
        slot, self._slot = self._slot, None
        try:
            if self._run is not None:
                self._run.__exit__()
        finally:
            if self._owns:
                self._sandbox.give_back(slot, self._limits)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def frame(request: dict) -> bytes:
    """A request as the shim reads it: length, then a Python literal."""
    data = repr(request).encode("utf-8", "backslashreplace")
    return b"%08x" % len(data) + data


def _exactly(channel: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        channel.settimeout(max(0.001, deadline - time.monotonic()))
        part = channel.recv(min(count - len(data), 1 << 20))
        if not part:
            raise OSError("the sandbox closed its channel")
        data += part
    return bytes(data)


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


def _check_paths(files: dict[str, bytes]) -> None:
    for path in files:
        if path.startswith("/") or ".." in path.split("/") or not path:
            raise ValueError(f"Sandbox: file path {path!r} must be relative and stay inside")
