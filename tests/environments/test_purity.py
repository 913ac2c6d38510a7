"""Importing environments brings in no jax; tasks are the same in any process and any Python."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from nemotron_jax.environments import registry
from nemotron_jax.environments.check import digest

ROOT = pathlib.Path(__file__).parents[2]
TASKS = 3


def other_pythons() -> list[str]:
    """Pythons of other versions, 3.11 or newer, that run."""
    names = [shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14)]
    names += map(str, pathlib.Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python"))
    found: dict[str, str] = {}
    for name in filter(None, names):
        code = "import sys; print(sys.version_info[:2])"
        run = subprocess.run([name, "-c", code], capture_output=True, text=True, check=False)
        if run.returncode == 0 and str(sys.version_info[:2]) != run.stdout.strip():
            found.setdefault(run.stdout.strip(), name)
    return list(found.values())


def available() -> list[str]:
    return [name for name in registry if not registry[name].unavailable()]


def digests(python: str, names: list[str]) -> dict[str, str]:
    code = (
        "from nemotron_jax.environments import registry\n"
        "from nemotron_jax.environments.check import digest\n"
        f"for name in {names}: print(name, digest(registry[name], {TASKS}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([python, "-c", code], cwd=ROOT, env=environment, capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return dict(line.split() for line in run.stdout.splitlines())


def own(names: list[str]) -> dict[str, str]:
    return {name: digest(registry[name], TASKS) for name in names}


def test_importing_every_environment_imports_no_jax() -> None:
    code = (
        "import sys; from nemotron_jax.environments import registry, check, rows\n"
        "list(registry.values())\n"
        "sys.exit(bool({'jax', 'jaxlib', 'flax', 'optax', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_another_process_makes_the_same_tasks() -> None:
    names = available()
    assert digests(sys.executable, names) == own(names)


def test_another_python_makes_the_same_tasks() -> None:
    names = [name for name in available() if name != "reasoning_gym"]  # a package of its own
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python of 3.11 or newer is here")
    for python in pythons:
        assert digests(python, names) == own(names), python
