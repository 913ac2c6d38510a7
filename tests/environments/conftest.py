"""A sandbox of each tier that the machine can give."""

import pytest

from nemotron_jax.environments.sandbox import Sandbox, SandboxUnavailable


@pytest.fixture(scope="module", params=["full", "fallback"])
def box(request):
    try:
        sandbox = Sandbox(tier=request.param)
    except SandboxUnavailable as error:
        pytest.skip(f"the {request.param} tier is not to be had here: {error}")
    with sandbox:
        yield sandbox
