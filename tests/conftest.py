"""Every test runs on the CPU unless told otherwise, and compiled programs are kept between runs."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# jax reads these when it is imported, so they stand before any test module.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on two busy cores wait for each other longer than the usual half minute. A test is
# mostly compilation: the gradient of a small hybrid model takes 9 s of CPU as users compile it, 6
# without LLVM's optimisations, and 2.3 with XLA's older code for fusions, which jaxlib 0.12 no
# longer has. The operations are the same.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
if [int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]] < [0, 11]:
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

collect_ignore = [] if importlib.util.find_spec("torch") else ["hf"]

# Each compiled program takes a few memory mappings, of which Linux gives a process 65,530; past
# them a compilation fails or crashes. No test file makes half as many as are left here.
_FEW_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Lets go of compiled programs after a test file that leaves too many behind."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and mappings.exists():
        with mappings.open() as lines:
            many = sum(1 for _ in lines) > _FEW_MAPPINGS
        if many:
            sys.modules["jax"].clear_caches()
            gc.collect()


@pytest.fixture(scope="module", autouse=True)
def no_environment_left() -> Iterator[None]:
    """Forgets environments that a test file registered: other files ask for all that there are."""
    yield
    if catalogue := sys.modules.get("nemotron_jax.environments.catalogue"):
        known, homes = catalogue.registry._loaded, catalogue.registry._homes
        for name in [name for name in known if name not in homes]:
            del known[name]
        catalogue._found.clear()


@pytest.fixture(scope="module", autouse=True)
def no_mesh_left() -> Iterator[None]:
    """Fails a test file that enters a mesh and never leaves it: the next file would run on it."""
    yield
    if "jax" in sys.modules:
        assert sys.modules["jax"].sharding.get_mesh().empty, "a mesh was left entered"
