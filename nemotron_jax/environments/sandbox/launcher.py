"""The launcher: a small process that starts sandboxes, and ends them however its user ends.

It is one thread without jax, so that it may fork, and so that "killed when the parent dies" means
this process and not some thread of the user's. A second process, the sweeper, waits for the
launcher's death and then removes what sandboxes might have left: processes, folders, the group.

A request is one message on the socket of `launch`: JSON, with five descriptors (the shim's
channel, stdin, stdout, stderr, control). The run is killed when its control closes; its exit status
is reported there.
"""

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import time
from typing import Any

from nemotron_jax.environments.sandbox import kernel_calls, memory_group, seccomp, tiers

STARTUP_S = 30.0  # from fork to the shim's first word; more than that is a machine in trouble
FILES_IN_SCRATCH = 4096  # inodes take kernel memory that no size limit counts
LONGEST_PATH = 1024  # of those looked at; deeper ones would take the launcher's time
POLL_S = 0.05  # between two looks at scratch folders that have no limit of their own


class Launcher:
    """Starts and ends sandboxes on request."""

    def __init__(self, requests: socket.socket, settings: dict) -> None:
        self.requests = requests
        self.settings = tiers.Settings(**settings)
        self.parent, self.pid = os.getppid(), os.getpid()
        with open(tiers.SHIM, encoding="utf-8") as file:
            self.shim = file.read()
        self.base, self.claim = tiers.claim_uids(self.settings.slots)
        self.folder = tiers.make_scratch(self.pid)
        name = f"nemotron_sandbox_{self.pid}"
        self.group = memory_group.make(
            name, memory_bytes=self.settings.memory_bytes, tasks=64 * self.settings.slots + 8
        )
        self.alive = self._start_sweeper()
        if self.group:
            self.group.join()
        self.mounts = self._own_mounts()
        kernel_calls.prctl(kernel_calls.PR_SET_CHILD_SUBREAPER, 1)
        self.runs: dict[int, dict] = {}
        self.removed = 0  # scratch folders handed to a child that deletes them
        self.selector = selectors.DefaultSelector()

    def _own_mounts(self) -> bool:
        """Whether scratch folders can be file systems of limited size, seen by nobody else."""
        if self.base is None:
            return False
        try:
            kernel_calls.enter_private_mounts()
            kernel_calls.mount_memory(self.folder, size=1 << 20, files=1024, uid=0)
            os.chmod(self.folder, 0o711)
            return True
        except OSError:
            return False

    def _start_sweeper(self) -> int:
        """Fork the sweeper; the descriptor returned keeps it waiting as long as it is open."""
        source, alive = os.pipe()
        if os.fork():
            os.close(source)
            return alive
        with contextlib.suppress(BaseException):
            os.setsid()
            os.close(alive)
            self.requests.close()
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)
            os.read(source, 1)
            self._sweep()
        os._exit(0)

    def _sweep(self) -> None:
        for attempt in range(100):
            for uid in self._uids_alive():
                _kill_uid(uid)
            if os.path.isdir(self.folder):
                _remove_tree(self.folder)
            if self.group is None or self.group.remove():
                return
            time.sleep(0.01 * min(attempt, 20))

    def _uids_alive(self) -> set[int]:
        """The slots' uids under which a process still runs."""
        found = set()
        for name in filter(str.isdigit, os.listdir("/proc") if self.base is not None else ()):
            with contextlib.suppress(OSError):
                found.add(os.stat(f"/proc/{name}").st_uid)
        return {uid for uid in found if 0 <= uid - (self.base or 0) < self.settings.slots}

    def serve(self) -> None:
        """Answer requests until the user of this launcher is gone."""
        wake, wake_sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_sink, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for name in (signal.SIGINT, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)  # a terminal's Ctrl-C is for the user's process
        self.selector.register(self.requests, selectors.EVENT_READ, None)
        self.selector.register(wake, selectors.EVENT_READ, wake)
        while os.getppid() == self.parent:
            polled = not self.mounts and self.settings.tier == "fallback" and self.runs
            for key, _ in self.selector.select(POLL_S if polled else 1.0):
                if key.fileobj is self.requests:
                    if not self._start():
                        return
                elif key.data == wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake, 4096)
                else:
                    self._kill(key.data)
            self._reap()
            self._watch(bool(polled))

    def _start(self) -> bool:
        message, handles, _, _ = socket.recv_fds(self.requests, 65536, 5)
        if not message:
            return False
        order: dict[str, Any] = json.loads(message)
        control = socket.socket(fileno=handles[4])
        scratch = os.path.join(self.folder, f"slot-{order['slot']}")
        try:
            self._make_box(scratch, order)
            pid = os.fork()
        except OSError as error:
            self._clear_box(scratch)
            _tell(control, {"error": f"the launcher could not start a process: {error}"})
            for handle in handles[:4]:
                os.close(handle)
            return True
        if pid == 0:
            self._become(order, handles, scratch)
        for handle in handles[:4]:
            os.close(handle)
        deadline = time.monotonic() + STARTUP_S + order["wall_s"]
        run = dict(order, pid=pid, control=control, scratch=scratch, deadline=deadline)
        self.runs[pid] = dict(run, killed=None)
        self.selector.register(control, selectors.EVENT_READ, pid)
        return True

    def _make_box(self, scratch: str, order: dict) -> None:
        if self.settings.tier == "full" and not self.mounts:
            return  # bubblewrap brings its own
        owner = self.base + order["slot"] if self.base is not None else os.getuid()
        os.mkdir(scratch, 0o700)
        if self.mounts:
            size, files = order["scratch_bytes"], FILES_IN_SCRATCH
            kernel_calls.mount_memory(scratch, size=size, files=files, uid=owner)
        for folder in ("box", "tmp"):
            os.mkdir(os.path.join(scratch, folder), 0o700)
            if self.base is not None:
                os.chown(os.path.join(scratch, folder), owner, owner)
        if self.base is not None:
            os.chown(scratch, owner, owner)

    def _clear_box(self, scratch: str) -> None:
        if self.mounts:
            with contextlib.suppress(OSError):
                kernel_calls.unmount(scratch)
            with contextlib.suppress(OSError):
                os.rmdir(scratch)
        elif os.path.lexists(scratch):
            # Ten thousand entries take a disk seconds, in which other sandboxes must be served.
            self.removed += 1
            refuse = os.path.join(self.folder, f"removed-{self.removed}")
            os.rename(scratch, refuse)
            if os.fork() == 0:
                os.closerange(3, 4096)
                with contextlib.suppress(BaseException):
                    _remove_tree(refuse)
                os._exit(0)

    def _become(self, order: dict, handles: list[int], scratch: str) -> None:
        """In the child: give up every power, then become the sandbox. Never returns."""
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            # Copies above the targets first: a received descriptor may have a target's number.
            high = [fcntl.fcntl(handle, fcntl.F_DUPFD, 5) for handle in handles[:4]]
            for target, handle in zip((3, 0, 1, 2), high):
                os.dup2(handle, target)
            os.closerange(4, 4096)  # the other sandboxes' descriptors
            for name in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(name, signal.SIG_DFL)
            own_uid = self.base is None
            filter_program = seccomp.program(
                may_fork=order["processes"] > 1,
                own_uid=own_uid and self.settings.tier == "fallback",
                host_files=self.settings.tier == "fallback",
            )
            self._limit(order)
            if not own_uid:
                user = self.base + order["slot"]
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            kernel_calls.prctl(kernel_calls.PR_SET_PDEATHSIG, signal.SIGKILL)
            kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1)
            if os.getppid() != self.pid:
                os._exit(125)
            if self.settings.tier == "full":
                self._enter_bubblewrap(order, scratch, filter_program)
            else:
                self._enter_landlock(scratch, filter_program)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(126)

    def _limit(self, order: dict) -> None:
        with contextlib.suppress(OSError):  # should memory run out, sandboxes go first
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")
        for limit, value in (
            (resource.RLIMIT_AS, order["memory_bytes"]),
            (resource.RLIMIT_FSIZE, min(order["file_bytes"], order["scratch_bytes"])),
            (resource.RLIMIT_NOFILE, order["open_files"]),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            resource.setrlimit(limit, (value, value))
        # The first limit is a signal that the code may catch, the second its end.
        resource.setrlimit(resource.RLIMIT_CPU, (order["cpu_s"], order["cpu_s"] + 1))

    def _enter_bubblewrap(self, order: dict, scratch: str, filter_program: bytes) -> None:
        source, sink = os.pipe()
        os.write(sink, filter_program)  # smaller than a pipe's buffer
        os.dup2(source, 4)
        os.set_inheritable(4, True)  # dup2 does so only for another number
        os.closerange(5, 4096)
        box = scratch if self.mounts else None
        arguments = self.settings.bubblewrap_arguments(order["scratch_bytes"], box, filter_fd=4)
        os.execve(self.settings.bubblewrap, arguments + self._python(), {})

    def _enter_landlock(self, scratch: str, filter_program: bytes) -> None:
        home = os.path.join(scratch, "box")
        os.chdir(home)
        environment = tiers.ENVIRONMENT | {"HOME": home, "TMPDIR": os.path.join(scratch, "tmp")}
        kernel_calls.restrict_paths(self.settings.readable(), [scratch], tiers.DEVICES)
        kernel_calls.install_filter(filter_program)
        arguments = self._python()
        os.execve(arguments[0], arguments, environment)

    def _python(self) -> list[str]:
        return [self.settings.python, "-s", "-S", "-B", "-c", self.shim]

    def _kill(self, pid: int, why: str = "closed") -> None:
        run = self.runs.get(pid)
        if run is None or run["killed"]:
            return
        run["killed"] = why
        self.selector.unregister(run["control"])
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)

    def _watch(self, polled: bool) -> None:
        now = time.monotonic()
        for pid, run in list(self.runs.items()):
            if now > run["deadline"]:
                self._kill(pid, "wall")
            elif polled and _bigger_than(run["scratch"], run["scratch_bytes"]):
                self._kill(pid, "scratch")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.runs:
                self._finish(self.runs.pop(pid), status)

    def _finish(self, run: dict, status: int) -> None:
        if not run["killed"]:
            self.selector.unregister(run["control"])
        # bubblewrap's processes end with their namespace; only when it was killed may they lag.
        lagging = run["killed"] or (self.settings.tier == "fallback" and run["processes"] > 1)
        if lagging and self.base is not None:
            _kill_uid(self.base + run["slot"])
        self._clear_box(run["scratch"])
        code = os.waitstatus_to_exitcode(status)
        report = {"code": code if code >= 0 else 128 - code, "killed": run["killed"]}
        _tell(run["control"], report)


def _tell(control: socket.socket, report: dict) -> None:
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(report).encode())
    control.close()


def _kill_uid(uid: int) -> None:
    """End every process of a uid that belongs to one sandbox, from a child that takes that uid."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            if os.getresuid() == (uid, uid, uid):
                for _ in range(100):  # ends with an error as soon as nobody is left
                    os.kill(-1, signal.SIGKILL)
                    time.sleep(0.001)
        os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _remove_tree(folder: str) -> None:
    """Delete a tree that hostile code made: deep, without permissions, full of links."""
    for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            with contextlib.suppress(OSError):
                os.execvp(command[0], command)
            os._exit(127)
        os.waitpid(child, 0)


def _bigger_than(folder: str, most: int) -> bool:
    """Whether a tree holds more bytes, more entries, or longer paths than allowed."""
    size, entries, pending = 0, 0, [folder]
    while pending:
        with contextlib.suppress(OSError):
            for entry in os.scandir(pending.pop()):
                entries += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                if size > most or entries > FILES_IN_SCRATCH or len(entry.path) > LONGEST_PATH:
                    return True
    return False


def launch(descriptor: int, settings: str) -> None:
    """Serve requests on a socket until it closes at the other end; settings is JSON."""
    launcher = Launcher(socket.socket(fileno=descriptor), json.loads(settings))
    group = launcher.group and launcher.group.kind
    facts = {"group": group, "mounts": launcher.mounts, "first_uid": launcher.base}
    print(json.dumps(facts), flush=True)
    launcher.serve()
