"""Model-written code runs here and nowhere else: in a sandbox with limits, or not at all.

`shared().run(code)` runs a program; PythonKernel and Shell live over several requests.
docs/sandbox.md says what each tier protects from, and what it does not.
"""

from nemotron_jax.environments.sandbox.limits import KERNEL_LIMITS, SHELL_LIMITS, Limits, Result
from nemotron_jax.environments.sandbox.runner import (
    Sandbox,
    budget_of_a_part,
    divide_budget,
    shared,
)
from nemotron_jax.environments.sandbox.sessions import FileEntry, Output, PythonKernel, Shell
from nemotron_jax.environments.sandbox.tiers import UIDS_A_BLOCK as MOST_SLOTS
from nemotron_jax.environments.sandbox.tiers import SandboxUnavailable

__all__ = [
    "KERNEL_LIMITS",
    "MOST_SLOTS",
    "SHELL_LIMITS",
    "FileEntry",
    "Limits",
    "PythonKernel",
    "Output",
    "Result",
    "Sandbox",
    "SandboxUnavailable",
    "Shell",
    "budget_of_a_part",
    "divide_budget",
    "shared",
]
