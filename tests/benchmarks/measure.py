"""Seconds, memory and the machine's other load, measured alike for both sides; Linux only."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.cases import Case


def use_threads(count: int) -> None:
    """Keep this process on its first `count` cores; call before a library makes its threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)


def resident_mb() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    """The most memory that this process ever held, imports and compilation among it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Duration(NamedTuple):
    """What one call took: by the clock, and of all this process's threads together."""

    wall_s: float
    cpu_s: float


def timed(run: Callable[[], None]) -> Duration:
    """How long a call takes that returns when its work is done."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return Duration(time.perf_counter() - start, time.process_time() - cpu)


def repeat(case: Case, run: Callable[[], Duration]) -> dict[str, Any]:
    """Times of the case's repetitions; `run` does one and returns the time that counts.

    `first_run_s` holds what comes once, compilation above all. `other_cores` is how many cores
    other processes used meanwhile: above 0.2 the wall-clock rates are pessimistic, while CPU time
    on one thread hardly changes.
    """
    first = timed(run)
    for _ in range(case.warm_up - 1):
        run()
    busy, own, start = _machine_cpu_s(), time.process_time(), time.perf_counter()
    times = [run() for _ in range(case.repetitions)]
    wall = time.perf_counter() - start
    others = (_machine_cpu_s() - busy) - (time.process_time() - own)
    seconds = [each.wall_s for each in times]
    return {
        "seconds": seconds,
        "best_s": min(seconds),
        "median_s": statistics.median(seconds),
        "best_cpu_s": min(each.cpu_s for each in times),
        "tokens_per_second": case.tokens / min(seconds),
        "tokens_per_cpu_second": case.tokens / max(min(each.cpu_s for each in times), 1e-9),
        "first_run_s": first.wall_s,
        "peak_mb": peak_mb(),
        "other_cores": max(0.0, others / wall),
    }


def _machine_cpu_s() -> float:
    """Seconds that all cores together have not been idle since boot."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
