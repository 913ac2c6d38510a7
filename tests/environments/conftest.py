"""A sandbox of each tier that the machine can give."""

import shutil
import subprocess

import pytest

from nemotron_jax.environments.sandbox import Sandbox, kernel_calls


def missing(tier: str) -> str | None:
    """Why the machine cannot give a tier, judged without the sandbox: its own faults must show."""
    if tier == "fallback":
        return None if kernel_calls.landlock_version() else "this kernel has no Landlock"
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed"
    plain = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/"]
    run = subprocess.run([*plain, "true"], capture_output=True, text=True, check=False)
    return f"bubblewrap cannot work here: {run.stderr}" if run.returncode else None


@pytest.fixture(scope="module", params=["full", "fallback"])
def box(request):
    if reason := missing(request.param):
        pytest.skip(f"the {request.param} tier is not to be had: {reason}")
    with Sandbox(tier=request.param) as sandbox:
        yield sandbox
