"""Pieces of work that wait for a server, side by side."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Found = TypeVar("Found")


def side_by_side(
    work: Callable[[int], Found], count: int, threads: int
) -> Iterator[tuple[int, Found]]:
    """work(0) … work(count - 1) by so many threads: each number with its result, as they end.

    An exception in one is raised here. Whoever leaves early, as by Ctrl-C, waits for nothing: what
    has not begun never does, and what has begun does not keep the program from ending.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[int, Found | None, BaseException | None]] = queue.SimpleQueue()
    for number in range(count):
        waiting.put(number)

    def serve() -> None:
        while (number := _next(waiting)) is not None:
            try:
                ended.put((number, work(number), None))
            except BaseException as error:  # it is the caller's
                ended.put((number, None, error))

    for _ in range(min(threads, count)):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for _ in range(count):
            number, found, error = ended.get()
            if error is not None:
                raise error
            yield number, found
    finally:
        while _next(waiting) is not None:
            pass


def _next(numbers: "queue.SimpleQueue[int]") -> int | None:
    try:
        return numbers.get_nowait()
    except queue.Empty:
        return None
