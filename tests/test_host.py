"""What a program sets in its own process before jax is imported."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_jax import host

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from nemotron_jax import host
print("began", flush=True)
host.use_huge_pages()
host.show_cpu_devices(3)
host.give_back_freed_memory()
flags = os.environ["XLA_FLAGS"].replace(" ", ",")
print(os.environ.get("GLIBC_TUNABLES"), flags, sys.argv[1], os.getpid())
"""


def run(**environment: str) -> list[str]:
    """The lines of a program that sets everything, the last one split at blanks."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "argument"],
        cwd=ROOT,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    *began, last = output.splitlines()
    assert set(began) == {"began"} and last.split()[-2:] == ["argument", str(process.pid)]
    return [*began, *last.split()[:-2]]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_program_starts_once_more_with_huge_pages():
    tunables = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
    flags = "--xla_force_host_platform_device_count=3,--xla_cpu_parallel_codegen_split_count=3"
    assert run() == ["began", "began", tunables, flags]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize(("first", "heaps"), [("host.share_one_heap()", "1"), ("", "5")])
def test_threads_that_begin_later_share_one_heap(first: str, heaps: str):
    program = f"""
import ctypes, os, tempfile, threading
from nemotron_jax import host
{first}
library, all_there = ctypes.CDLL("libc.so.6"), threading.Barrier(4)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
def allocate():
    library.malloc(5000)
    all_there.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
with tempfile.NamedTemporaryFile("r") as file:
    stream = ctypes.c_void_p(library.fopen(file.name.encode(), b"w"))
    library.malloc_info(0, stream)
    library.fclose(stream)
    print(file.read().count("<heap nr="))
"""
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, cwd=ROOT, env=clean, text=True).strip() == heaps


def test_the_users_own_settings_win():
    own = "--xla_force_host_platform_device_count=5"
    tunables, flags = "glibc.malloc.check=0", f"{own},--xla_cpu_parallel_codegen_split_count=3"
    assert run(GLIBC_TUNABLES=tunables, XLA_FLAGS=own) == ["began", tunables, flags]


def test_a_tpus_flags_are_added_to_the_users_own_which_win(monkeypatch):
    own = "--xla_enable_async_all_gather=false --xla_other=3"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
    host.overlap_collectives()
    flags = dict(flag.split("=") for flag in os.environ["LIBTPU_INIT_ARGS"].split())
    assert os.environ["LIBTPU_INIT_ARGS"].startswith(own)
    assert flags["--xla_enable_async_all_gather"] == "false"
    assert flags["--xla_tpu_enable_async_collective_fusion"] == "true"
    before = os.environ["LIBTPU_INIT_ARGS"]
    host.overlap_collectives()
    assert os.environ["LIBTPU_INIT_ARGS"] == before  # each stands there once


@pytest.mark.parametrize(
    ("file", "platforms", "found"),
    [
        ("nvidia0", "", True),
        ("accel3", "tpu", True),
        ("vfio/7", "", True),
        ("nvidia0", "cpu", False),
        ("null", "", False),
    ],
)
def test_a_host_with_an_accelerator_is_known_by_its_device_files(
    file, platforms, found, tmp_path, monkeypatch
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert host.feeds_accelerator(tmp_path) == found


def test_a_notebook_keeps_compiled_programs_though_it_imports_jax_first(tmp_path) -> None:
    code = (
        "import jax, jax.numpy as jnp\njax.jit(jnp.sin)(1.0)\nimport nemotron_jax as nj\n"
        "nj.ModelConfig\njax.jit(jnp.cos)(1.0)\nprint(jax.config.jax_compilation_cache_dir)"
    )
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    least = {"XDG_CACHE_HOME": str(tmp_path), names[1]: "0"}

    def cached(**own: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**clean, **least, **own},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    folder = tmp_path / "nemotron_jax" / "jax"
    assert cached() == str(folder) and any(folder.glob("jit_cos*"))
    assert cached(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == str(tmp_path / "own")
