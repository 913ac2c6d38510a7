"""The processes of one run: they meet, exchange values, and hear when one of them has ended.

Process 0 listens, the others connect to it, and lines of JSON go to and fro. No device takes part:
values are exchanged while devices compute, and a loss is heard of while they wait in vain.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

JOIN_S = 300.0  # in which all processes must come: a pod's machines do not start together
BEAT_S = 5.0  # between two signs of life
# Without a sign of life for so long a process counts as ended: its machine is gone, or it is
# stopped. With the grace below it leaves some of the minute in which all others must have ended.
SILENT_S = 40.0
GRACE_S = 5.0  # in which a process that hears of a loss may still end with an error of its own
_FORMAT = "nemotron_jax.peers 1"
_MOST_BYTES = 1 << 22  # of one line; the longest holds a config
_TOLD_FACTS = 3  # differences that an error names

Facts = Mapping[str, str]


class PeerEnded(RuntimeError):
    """Another process of the run has ended, or gives no sign of life."""


class _Link:
    """A connection to one process, line by line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENT_S)
        self.connection = connection
        self.heard_at = time.monotonic()
        self.said_goodbye = False
        self._rest = b""
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        """Send a line; one that cannot be sent is not missed, for the reader hears why."""
        with contextlib.suppress(OSError), self._lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """The messages that have come whole; None once there will be no more."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        self.heard_at = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _MOST_BYTES:
            return None
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None

    def receive_one(self, deadline: float) -> list[Any] | None:
        """The first message, for those who meet; None where none comes."""
        while (left := deadline - time.monotonic()) > 0:
            self.connection.settimeout(left)
            messages = self.receive()
            if messages is None or messages:
                self.connection.settimeout(SILENT_S)
                return messages[0] if messages else None
        return None


class Peers:
    """This process among `count`, which all call the same methods in the same order.

    `on_loss` runs in a thread of its own, `GRACE_S` after another process has ended without a
    goodbye. `told` is what process 0 told all when they met.
    """

    def __init__(
        self,
        index: int,
        count: int,
        links: dict[int, _Link],
        on_loss: Callable[[], None],
        told: Any = None,
    ) -> None:
        self.index, self.count, self.told = index, count, told
        self.lost = threading.Event()
        self._links, self._on_loss = links, on_loss
        self._numbers: dict[str, int] = {}  # of the next exchange of each name
        self._said: dict[tuple[str, int], dict[int, Any]] = {}
        self._heard: dict[tuple[str, int], list[Any]] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._read, name="peers", daemon=True).start()

    def exchange(self, value: Any = None, name: str = "") -> list[Any]:
        """The JSON-able values that the processes say, by index; returns when all have said one."""
        return self.hear(self.say(value, name))

    def say(self, value: Any, name: str = "") -> tuple[str, int]:
        """Begin an exchange; `hear` gives what all have said in it. Exchanges of different names
        may be under way at once, as those of different threads are."""
        with self._news:
            key = (name, self._numbers.setdefault(name, 0))
            self._numbers[name] += 1
            if self.index == 0:
                self._collect(key, 0, value)
        if self.index != 0:
            self._links[0].send("say", *key, value)
        return key

    def hear(self, key: tuple[str, int]) -> list[Any]:
        """What all have said in an exchange; raises PeerEnded where one has ended before."""
        with self._news:
            self._news.wait_for(lambda: key in self._heard or self.lost.is_set())
            if key not in self._heard:
                raise PeerEnded("another process of this run ended")
            return self._heard.pop(key)

    def goodbye(self) -> None:
        """Tell the others that this process ends because its work is done."""
        for link in self._links.values():
            link.send("goodbye")

    def _collect(self, key: tuple[str, int], index: int, value: Any) -> None:
        """Process 0: what one says; the last of them makes the exchange complete."""
        said = self._said.setdefault(key, {})
        said[index] = value
        if len(said) == self.count:
            values = [said[number] for number in range(self.count)]
            del self._said[key]
            self._heard[key] = values
            self._news.notify_all()
            for link in self._links.values():
                link.send("heard", *key, values)

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, link in self._links.items():
                selector.register(link.connection, selectors.EVENT_READ, index)
            beaten_at = time.monotonic()
            while selector.get_map():
                for key, _ in selector.select(1.0):
                    if not self._take(key.data, self._links[key.data].receive()):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                for index, link in self._links.items():
                    if now - link.heard_at > SILENT_S and not link.said_goodbye:
                        self._lose(index)
                if now - beaten_at >= BEAT_S:
                    beaten_at = now
                    for link in self._links.values():
                        link.send("beat")

    def _take(self, index: int, messages: list[list[Any]] | None) -> bool:
        """What a process has sent; False once it will send no more."""
        for kind, *rest in messages or ():
            if kind == "say":
                with self._news:
                    self._collect((rest[0], rest[1]), index, rest[2])
            elif kind == "heard":
                with self._news:
                    self._heard[rest[0], rest[1]] = rest[2]
                    self._news.notify_all()
            elif kind == "goodbye":
                self._links[index].said_goodbye = True
            elif kind == "lost":
                self._lose(index)
        if messages is None and not self._links[index].said_goodbye:
            self._lose(index)
        return messages is not None

    def _lose(self, index: int) -> None:
        """Take note that a process has ended, and let the others know."""
        if self.lost.is_set():
            return
        self.lost.set()
        with self._news:
            self._news.notify_all()
        for other, link in self._links.items():
            if other != index:
                link.send("lost")
        timer = threading.Timer(GRACE_S, self._on_loss)
        timer.daemon = True
        timer.start()


def host_and_port(address: str) -> tuple[str, int] | None:
    """The two parts of `host:port`, where that of IPv6 stands in brackets; None for all else."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        return None
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16):
        return None
    return host.strip("[]") if bracketed else host, int(port)


def free_port() -> int:
    """A port of this machine at which nobody listens now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def listen(port: int) -> socket.socket:
    """Listen at a port of all this machine's addresses; at a free one for port 0."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)


def gather(
    server: socket.socket,
    count: int,
    facts: Facts,
    on_loss: Callable[[], None],
    *,
    told: Any = None,
    join_s: float = JOIN_S,
) -> Peers:
    """Process 0 among `count`, once all others have come to its server; they hear what is `told`.

    Raises ValueError where one was started otherwise than this one, whose `facts` theirs must
    equal, and TimeoutError where some do not come.
    """
    links: dict[int, _Link] = {}
    deadline = time.monotonic() + join_s
    with server:
        while len(links) < count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link = _Link(server.accept()[0])
            except TimeoutError:
                missing = [str(n) for n in range(1, count) if n not in links]
                reason = (
                    f"--process_count={count}: within {join_s:.0f} s no process came with "
                    f"--process_index={', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}; "
                    "start all of them"
                )
                _refuse(links.values(), reason)
                raise TimeoutError(reason) from None
            hello = link.receive_one(min(deadline, time.monotonic() + BEAT_S))
            if not _is_hello(hello):
                link.connection.close()  # someone else's
                continue
            _, index, their_count, theirs = hello
            if reason := _unfit(index, their_count, theirs, count, links, facts):
                _refuse([link, *links.values()], reason)
                raise ValueError(reason)
            links[index] = link
    for link in links.values():
        link.send("welcome", told)
        link.heard_at = time.monotonic()
    return Peers(0, count, links, on_loss, told)


def reach(
    host: str,
    port: int,
    count: int,
    index: int,
    facts: Facts,
    on_loss: Callable[[], None],
    *,
    join_s: float = JOIN_S,
) -> Peers:
    """Process `index` among `count`, once process 0 has welcomed all at its address.

    Raises ValueError where this one was started otherwise, and TimeoutError where nobody answers.
    """
    deadline = time.monotonic() + join_s
    while True:
        try:
            link = _Link(socket.create_connection((host, port), timeout=BEAT_S))
            link.send(_FORMAT, index, count, dict(facts))
            answer = link.receive_one(deadline + BEAT_S)
            if answer:
                break
        except OSError:
            pass  # process 0 does not listen yet, or its name is not known yet
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"--coordinator={host}:{port}: within {join_s:.0f} s no process 0 answered; start "
                "it, and name an address of its machine that this one can reach"
            )
        time.sleep(0.2)
    if answer[0] != "welcome":
        raise ValueError(str(answer[1]))
    return Peers(index, count, {0: link}, on_loss, answer[1])


def _is_hello(message: Any) -> bool:
    kinds = (str, int, int, dict)
    fits = isinstance(message, list) and [type(part) for part in message] == list(kinds)
    return fits and message[0] == _FORMAT


def _unfit(
    index: int,
    their_count: int,
    theirs: Facts,
    count: int,
    links: Mapping[int, _Link],
    facts: Facts,
) -> str | None:
    """Why a process cannot be one of this run's."""
    if their_count != count:
        return (
            f"process {index} was started with --process_count={their_count} and process 0 with "
            f"--process_count={count}; start all with the same"
        )
    if index in links or index == 0:
        return (
            f"two processes were started with --process_index={index}; number them from 0 to "
            f"{count - 1}"
        )
    names = sorted(n for n in facts.keys() | theirs.keys() if facts.get(n) != theirs.get(n))
    if not names:
        return None
    told = [f"{n}={theirs.get(n)} and not {facts.get(n)}" for n in names[:_TOLD_FACTS]]
    more = f" and {len(names) - _TOLD_FACTS} more" if len(names) > _TOLD_FACTS else ""
    return (
        f"process {index} was started otherwise than process 0, with {', '.join(told)}{more}; "
        "start all with the same command"
    )


def _refuse(links: Any, reason: str) -> None:
    for link in links:
        link.send("refused", reason)
