"""What an evaluation shows while it goes on: what is done, of how much, and the time left."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

LINE_EVERY_S = 10.0


class Progress:
    """Lines now and then about one suite's work; on a terminal the line is written over."""

    def __init__(
        self,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._name, self._clock = name, clock
        self._stream: TextIO = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._part, self._first, self._began, self._last = "", 0, clock(), clock()

    def at(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` things are done; the time left is reckoned since the first was."""
        now = self._clock()
        if what != self._part or done == 0:
            self._part, self._began, self._first = what, now, done
        if now - self._last < (0.5 if self._terminal else LINE_EVERY_S):
            return
        self._last = now
        text = f"{self._name}: {done}/{total} {what}".rstrip()
        if done > self._first:
            left = (now - self._began) / (done - self._first) * (total - done)
            text += f", {_minutes(left)} left"
        self._write(text, stays=False)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._write(f"{self._name}: {text}", stays=True)

    def _write(self, text: str, *, stays: bool) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}" + ("\n" if stays else ""))
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
