"""The server's log on stderr, written by a thread of its own: a full pipe holds up nobody."""

import contextlib
import logging
import logging.handlers
import os
import queue
import threading
from collections.abc import Iterator

LOG = logging.getLogger("nemotron_jax.serving")
# All that speak in the loop's thread. uvicorn does so of whatever a stranger sends that is no HTTP.
_SPEAKERS = (LOG.name, "uvicorn", "asyncio")
_STDERR = 2
# Lines that wait to be written; more are lost, where nobody reads. And the seconds that the last
# ones have at the end.
_MOST_WAITING, _END_S = 10_000, 1.0


class _Lines(logging.handlers.QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        """Keep a line for the thread that writes."""
        if self.queue.qsize() < _MOST_WAITING:
            self.queue.put_nowait(record)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write what the server, uvicorn and asyncio say, for as long as this lasts."""
    lines: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
    handler = _Lines(lines)
    writer = threading.Thread(target=_write, args=(lines,), name="log", daemon=True)
    writer.start()
    LOG.setLevel(logging.INFO)
    speakers = [logging.getLogger(name) for name in _SPEAKERS]
    for speaker in speakers:
        speaker.addHandler(handler)
        speaker.propagate = False
    try:
        yield
    finally:
        for speaker in speakers:
            speaker.removeHandler(handler)
            speaker.propagate = not speaker.handlers
        lines.put(None)
        writer.join(_END_S)


def _write(lines: "queue.SimpleQueue[logging.LogRecord | None]") -> None:
    """Write lines until there is None. By the system's own call, without a lock: who waits in it
    for ever keeps nobody from ending."""
    form = logging.Formatter("%(asctime)s %(message)s")
    for record in iter(lines.get, None):
        with contextlib.suppress(OSError):  # nobody will read it
            os.write(_STDERR, (form.format(record) + "\n").encode("utf-8", "backslashreplace"))
