"""What a program sets in its own process before jax is imported; a CPU's speed depends on it."""

import contextlib
import ctypes
import importlib
import os
import platform
import sys
from pathlib import Path

_DEVICES = "--xla_force_host_platform_device_count"
_COMPILED_PARTS = "--xla_cpu_parallel_codegen_split_count"
_WAITS = (
    "--xla_cpu_collective_call_terminate_timeout_seconds",
    "--xla_cpu_collective_timeout_seconds",
)
_WAIT_S = 600  # one process may compile, evaluate or write while the others wait for it
_TUNABLES = "GLIBC_TUNABLES"
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_CACHE_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_LIBTPU = "LIBTPU_INIT_ARGS"
# What makes gathers run beside products: as compiled for v5p without them none does. With the
# flags of the same names for reduce-scatters those stay as they are (libtpu 0.0.42).
_OVERLAP = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")  # CUDA, ROCm, TPU, TPU
_M_ARENA_MAX = -8  # mallopt's number of the setting, in malloc.h
_HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"


def show_cpu_devices(count: int, processes: int = 1) -> None:
    """Let a CPU show `count` devices, and compile for it in few parts at a time.

    Each part that LLVM compiles takes memory of its own; the usual 32 gain nothing on few cores.
    Other platforms do not look at either. A user's own XLA_FLAGS win, but for the number of devices
    of each of several processes, which follows from the mesh. Their programs wait for each other as
    long as busy cores may take. Has no effect once jax has looked for devices.
    """
    chosen = {_DEVICES: count, _COMPILED_PARTS: max(2, count)}
    if processes > 1:
        kept = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(f for f in kept if not f.startswith(_DEVICES))
        chosen |= dict.fromkeys(_WAITS, _WAIT_S)
    for flag, value in chosen.items():
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}={value}".strip()


def overlap_collectives() -> None:
    """Let a TPU's compiler run gathers of weights and tokens beside other work.

    libtpu alone reads the flags, when it is loaded. A flag that the user's own LIBTPU_INIT_ARGS
    names keeps the value given there.
    """
    given = os.environ.get(_LIBTPU, "")
    named = {flag.partition("=")[0] for flag in given.split()}
    missing = [flag for flag in _OVERLAP if flag.partition("=")[0] not in named]
    os.environ[_LIBTPU] = " ".join([*given.split(), *missing])


def keep_compiled_programs() -> None:
    """Let jax keep compiled programs in the user's cache folder, for this process and later ones.

    A user's own JAX_COMPILATION_CACHE_DIR or jax.config wins; JAX_ENABLE_COMPILATION_CACHE=0
    switches the cache off. Programs that compile within a fifth of a second are not worth a file.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault(_CACHE, str(Path(home) / "nemotron_jax" / "jax"))
    os.environ.setdefault(_CACHE_LEAST, "0.2")
    jax = sys.modules.get("jax")
    if jax is None or jax.config.jax_compilation_cache_dir is not None:
        return
    # jax read the environment when it was imported, which was before this.
    jax.config.update(_CACHE.lower(), os.environ[_CACHE])
    jax.config.update(_CACHE_LEAST.lower(), float(os.environ[_CACHE_LEAST]))
    cache = importlib.import_module("jax.experimental.compilation_cache.compilation_cache")
    cache.reset_cache()  # it looks for its folder once, at the first compilation


def use_huge_pages() -> None:
    """Start this program again with its memory in huge pages, unless it already runs so.

    XLA allocates a step's temporaries anew each time, and to fault them in by pages of 4 KB takes a
    sixth of a step on a CPU. glibc reads the setting when a process begins, so call this first in a
    program. A user's own GLIBC_TUNABLES win. Nothing happens without glibc, nor where the host
    feeds an accelerator: its many cores would share the one arena.
    """
    if _TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or feeds_accelerator():
        return
    os.environ[_TUNABLES] = _HUGE_PAGES
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def feeds_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether jax would find a GPU or TPU here, by its device files; JAX_PLATFORMS=cpu says no."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(any(devices.glob(name)) for name in _ACCELERATORS)


def share_one_heap() -> None:
    """Let the threads that this process begins from now on allocate from one heap.

    glibc gives each one of its own, up to eight a core, and keeps in each what was freed there; a
    server's threads mostly wait for the interpreter, not for a heap. A user's own GLIBC_TUNABLES
    win. Does nothing without glibc.
    """
    if _TUNABLES not in os.environ and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return to the system what was freed so far, once; a compiler leaves hundreds of megabytes.

    It takes some tens of milliseconds, in which other threads of Python's run. Does nothing without
    glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
