"""Work shared by processes that end with the one that began them."""

import concurrent.futures
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

REPORT_SECONDS = 10  # between two reports of what is done, in the shortest

Count = Callable[[int], None]
_work: dict[str, Any] = {}  # a worker's function and its shared counter


def in_processes(
    function: Callable[[Any, Count], Any], items: Sequence[Any], workers: int, report: Count
) -> Iterator[tuple[int, Any]]:
    """Number and `function(item, done)` of each item, as they come.

    The function calls `done` with amounts of work; `report` gets their sums from time to time. One
    worker is this very process. Raises what the function raises, ValueError where a worker dies.
    """
    if workers == 1 or len(items) < 2:
        yield from ((number, function(item, report)) for number, item in enumerate(items))
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(items)), context, _begin, (function, counter)
    )
    reported = 0
    try:
        numbers = {pool.submit(_call, item): number for number, item in enumerate(items)}
        while numbers:
            first = concurrent.futures.FIRST_COMPLETED
            finished, _ = concurrent.futures.wait(numbers, REPORT_SECONDS, first)
            total = counter.value
            report(total - reported)
            reported = total
            for future in finished:
                yield numbers.pop(future), future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory; begin again with fewer "
            "--workers: what is done stays"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any, Count], Any], counter: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    _work.update(function=function, counter=counter)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _work["function"](item, functools.partial(_add, _work["counter"]))


def _add(counter: Any, amount: int) -> None:
    with counter.get_lock():
        counter.value += amount
