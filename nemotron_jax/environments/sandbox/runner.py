"""Runs model-written code in sandboxes, many at once, under one memory budget."""

import atexit
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from nemotron_jax.environments.sandbox import channel, self_test, tiers
from nemotron_jax.environments.sandbox.limits import Limits, Result
from nemotron_jax.environments.sandbox.tiers import SandboxUnavailable

WAIT_FOR_SLOT_S = 120.0
_HELPERS = 3  # bubblewrap's first process, the shim, and the shell it starts
_THREADS = 16  # tasks that a run without processes of its own may have
# Only the launcher's three modules are imported there, never this package's other parts.
_LAUNCHER = (
    "import sys, types\n"
    "root = sys.argv[1]\n"
    "parts = ['nemotron_jax', 'environments', 'sandbox']\n"
    "for name in ('.'.join(parts[:n]) for n in (1, 2, 3)):\n"
    "    package = types.ModuleType(name)\n"
    "    package.__path__ = [root + '/' + name.replace('.', '/')]\n"
    "    sys.modules[name] = package\n"
    "from nemotron_jax.environments.sandbox.launcher import launch\n"
    "launch(int(sys.argv[2]), sys.argv[3])\n"
)


class Sandbox:
    """Sandboxes of the best tier this machine can give.

    `tier` asks for "full" or "fallback" alone. At most `slots` run at once and reserve
    `memory_bytes` together (by default half of what is available); the others wait. Starting tries
    attacks on each tier and raises SandboxUnavailable when none holds. Safe to use from threads.
    """

    def __init__(
        self,
        *,
        tier: str | None = None,
        slots: int = tiers.UIDS_A_BLOCK,
        memory_bytes: int | None = None,
        python: str | None = None,
    ) -> None:
        if tier not in (None, *tiers.TIERS):
            raise ValueError(f"Sandbox: tier={tier!r} is none of {', '.join(tiers.TIERS)}")
        if not 1 <= slots <= tiers.UIDS_A_BLOCK:
            raise ValueError(f"Sandbox: slots={slots} is not between 1 and {tiers.UIDS_A_BLOCK}")
        self.memory_bytes = memory_bytes or available_memory() // 2
        self.refused: list[str] = []
        for wanted in (tier,) if tier else tiers.TIERS:
            try:
                self._start(wanted, slots, python)
                return
            except SandboxUnavailable as error:
                self.refused.append(f"{wanted}: {error}")
        raise SandboxUnavailable("; ".join(self.refused) + f". {tiers.HELP}")

    def _start(self, tier: str, slots: int, python: str | None) -> None:
        self.settings = tiers.settings(
            tier, slots=slots, memory_bytes=self.memory_bytes, python=python
        )
        self.tier = tier
        self._free, self._reserved = list(range(slots)), 0
        self._changed = threading.Condition()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = os.path.abspath(__file__).rsplit("/nemotron_jax/", 1)[0]
        arguments = [root, str(theirs.fileno()), json.dumps(dataclasses.asdict(self.settings))]
        self._launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _LAUNCHER, *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        self._requests = ours
        atexit.register(self.close)
        said = self._launcher.stdout.readline()
        if not said:
            error = self._launcher.stderr.read().decode("utf-8", "replace").strip()
            self.close()
            raise SandboxUnavailable(f"the launcher did not start: {error[-500:]}")
        self.launched = json.loads(said)
        try:
            self.held = self_test.run(self.run)
        except SandboxUnavailable:
            self.close()
            raise

    def describe(self) -> str:
        """One line: the tier, what it is made of, and how the self-test went."""
        parts = [os.path.basename(self.settings.bubblewrap) or "Landlock", "seccomp", "rlimits"]
        parts.append("a uid for each slot" if os.getuid() == 0 else "the user's own uid")
        parts += [self.launched["group"]] if self.launched["group"] else []
        parts += ["scratch on tmpfs"] if self.launched["mounts"] else []
        line = f"sandbox: {self.tier} tier ({', '.join(parts)}); {self.held}"
        return line + "".join(f"; refused {reason}" for reason in self.refused)

    def run(
        self,
        code: str | None = None,
        *,
        command: list[str] | None = None,
        arguments: list[str] | None = None,
        files: dict[str, str | bytes] | None = None,
        stdin: str = "",
        limits: Limits = Limits(),
    ) -> Result:
        """Run Python source, or a command, to its end among `files` (relative paths)."""
        if (code is None) == (command is None):
            raise ValueError("Sandbox.run: pass either code or command")
        mode = "command" if code is None else "program"
        request = {"mode": mode, "code": code, "arguments": command or arguments or []}
        try:
            with self.reserve(limits) as slot:
                with channel.Run(self, slot, limits, request, files or {}) as run:
                    return run.finish(stdin.encode("utf-8", "surrogatepass"))
        except OSError as error:
            return Result("", "", -1, "exit", 0.0, f"sandbox: {error}")

    @contextlib.contextmanager
    def reserve(self, limits: Limits) -> Iterator[int]:
        """Wait for a slot and its memory, hold them for a while; yields the slot's number."""
        slot = self.take(limits)
        try:
            yield slot
        finally:
            self.give_back(slot, limits)

    def take(self, limits: Limits) -> int:
        """A slot with its memory reserved. Raises OSError when none is free for long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_room(limits), WAIT_FOR_SLOT_S):
                raise OSError(f"no slot was free for {WAIT_FOR_SLOT_S:.0f} s")
            self._reserved += limits.reserved_bytes
            return self._free.pop()

    def take_now(self, limits: Limits) -> int | None:
        """A slot with its memory reserved; None where one would have to be waited for."""
        with self._changed:
            return self.take(limits) if self.has_room(limits) else None

    def has_room(self, limits: Limits) -> bool:
        """Whether a slot and its memory are free now. Raises ValueError where they never are."""
        need = limits.reserved_bytes
        if need > self.memory_bytes:
            raise ValueError(
                f"Sandbox: limits reserve {need >> 20} MiB, more than the budget of "
                f"{self.memory_bytes >> 20} MiB; lower memory_bytes or processes"
            )
        return bool(self._free) and self._reserved + need <= self.memory_bytes

    def give_back(self, slot: int, limits: Limits) -> None:
        """Free what `take` gave."""
        with self._changed:
            self._free.append(slot)
            self._reserved -= limits.reserved_bytes
            self._changed.notify_all()

    def order(self, slot: int, limits: Limits, handles: list[int]) -> None:
        """Ask the launcher for one sandbox with these descriptors."""
        order = dict(dataclasses.asdict(limits), slot=slot)
        socket.send_fds(self._requests, [json.dumps(order).encode()], handles)

    def tasks(self, limits: Limits) -> int | None:
        """The limit on processes and threads, None where only fork is denied."""
        if self.tier == "fallback" and os.getuid() != 0:
            return None  # it would count the user's other processes
        return limits.processes + _HELPERS if limits.processes > 1 else _THREADS

    def close(self) -> None:
        """End every sandbox and wait until nothing is left of them."""
        atexit.unregister(self.close)
        self._requests.close()
        deadline = time.monotonic() + 10
        with self._launcher.stdout as said, selectors.DefaultSelector() as selector:
            # The sweeper holds the other end until it has finished.
            selector.register(said, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                self._launcher.poll()  # a control group with an unreaped process is not empty
                if selector.select(0.02) and not os.read(said.fileno(), 4096):
                    break
        self._launcher.stderr.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(5)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available_memory() -> int:
    """Bytes that programs can still take on this machine."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_shared: dict[int, Sandbox] = {}
_starting = threading.Lock()
_parts = 1  # processes of this machine that run sandboxes side by side


def divide_budget(parts: int) -> None:
    """Let `shared` take one part of so many of the memory that it would take alone."""
    global _parts
    _parts = parts


def budget_of_a_part(parts: int) -> int:
    """Bytes for the sandboxes of each of so many processes: half of what is available, together."""
    return available_memory() // 2 // parts


def shared() -> Sandbox:
    """This process's Sandbox, started when first asked for; prints its tier then."""
    with _starting:
        if os.getpid() not in _shared:
            _shared.clear()  # after a fork the parent's belongs to the parent
            _shared[os.getpid()] = Sandbox(memory_bytes=budget_of_a_part(_parts))
            print(_shared[os.getpid()].describe(), file=sys.stderr)
        return _shared[os.getpid()]
