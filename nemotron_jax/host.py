"""What a program sets in its own process before jax is imported; a CPU's speed depends on it."""

import contextlib
import ctypes
import os

_DEVICES = "--xla_force_host_platform_device_count"
# Names and numbers of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def show_cpu_devices(count: int) -> None:
    """Let a CPU show `count` devices; other platforms do not look at this.

    A user's own XLA_FLAGS win. Has no effect once jax has looked for devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DEVICES}={count}".strip()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of giving it back to the system.

    XLA allocates a step's temporaries anew each time; as mappings of their own they would be
    cleared and faulted in again, page by page, at every step. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)
    mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return to the system what was freed so far, once; a compiler leaves hundreds of megabytes.

    Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
