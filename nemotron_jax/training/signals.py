"""Stopping a run from outside, and keeping two processes from one run."""

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOCK_FILE = ".lock"


class StopSignal:
    """Whether SIGTERM or SIGINT asked the run to stop at the end of its step.

    A second one does what it would do without this. In a thread other than the main one, where
    Python delivers no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def sole_owner(run_directory: Path) -> Iterator[None]:
    """Holds a run's directory; raises ValueError while another process does.

    The operating system lets go when the process ends, however it ends.
    """
    with (run_directory / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run {run_directory} is being trained by another process; stop it, or choose "
                "another directory"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
