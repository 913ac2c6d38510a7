"""Serves, and says at its end which files were opened when, and how late the event loop came.

Run as `python -m tests.serving.watched OUTPUT FLAGS…`. Other processes may have the processors: so
of each lag it is told how long the loop's thread, and how long those that may hold the interpreter,
stood in the queue for one.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nemotron_jax.serve import main
from nemotron_jax.serving import app
from nemotron_jax.serving.driver import Driver

# Every hundredth of a second: of the server's own looks, ten times as rare, the worst thousandth in
# two minutes would be one.
LOOK_S = 0.01
OPENED: list[tuple[float, str]] = []
LAGS: list[
    tuple[float, float, float, float]
] = []  # when, and seconds: lag, loop's and others' wait


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and not isinstance(arguments[0], int):  # an int is a pipe that is open
        OPENED.append((time.monotonic(), str(arguments[0])))


def waited_s(files: dict[int, Any]) -> tuple[float, float]:
    """How long this thread, and how long all others of Python's, have waited for a processor."""
    found = {threading.get_native_id(): 0.0}
    for thread in threading.enumerate():
        number = thread.native_id
        with contextlib.suppress(OSError, IndexError):  # it has ended
            if number not in files:
                files[number] = open(f"/proc/self/task/{number}/schedstat")
            files[number].seek(0)
            found[number] = int(files[number].read().split()[1]) / 1e9
    own = found.pop(threading.get_native_id())
    return own, sum(found.values())


async def measure(driver: Driver) -> None:
    """As the server's own, and whom it waited for."""
    files: dict[int, Any] = {}
    while True:
        before, began = waited_s(files), time.monotonic()
        await asyncio.sleep(LOOK_S)
        lag = max(time.monotonic() - began - LOOK_S, 0.0)
        driver.metrics.lag.add(lag)
        own, others = (max(b - a, 0.0) for a, b in zip(before, waited_s(files), strict=True))
        LAGS.append((began, lag, own, others))


if __name__ == "__main__":
    sys.addaudithook(note)
    app._measure_lag = measure
    status = main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps({"opened": list(OPENED), "lags": LAGS}))
    sys.exit(status)
