"""Stopping a run from outside, and keeping a second start from a run that goes on."""

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from typing import Any

from nemotron_jax import distributed
from nemotron_jax.run_directory import RunDirectory

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOCK_FILE = ".lock"  # in a run's directory, held while a session of it runs


class StopSignal:
    """Whether SIGTERM or SIGINT asked the run to stop at the end of its step.

    A second one does what it would do without this. In a thread other than the main one, where
    Python delivers no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}
        self._asked: Any = None  # the exchange of the step before

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def agreed(self) -> bool:
        """Whether any process was asked, as far as known: the same in all, which call it at every
        step. Of other processes it tells what they were asked by the step before, for that answer
        is here without waiting."""
        if distributed.process_count() == 1:
            return self.requested
        before, self._asked = self._asked, distributed.say(self.requested, "stop")
        return before is not None and any(distributed.hear(before))

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
def sole_owner(directory: RunDirectory) -> Iterator[None]:
    """Holds a run's directory; raises ValueError while another start of the run does.

    Of several processes the writer holds it for all. The operating system lets go when the process
    ends, however it ends.
    """
    with contextlib.ExitStack() as stack:
        distributed.from_first(lambda: _lock(directory, stack))
        yield


def _lock(directory: RunDirectory, stack: contextlib.ExitStack) -> None:
    file = stack.enter_context((directory.path / _LOCK_FILE).open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"run {directory.path} is being trained by another process; stop it, or choose "
            "another directory"
        ) from None
    except OSError:
        pass  # a file system without locks
