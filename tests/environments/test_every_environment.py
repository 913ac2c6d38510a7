"""Every registered environment has the properties that check.py names."""

import pytest

from nemotron_jax.environments import registry
from nemotron_jax.environments.check import check


@pytest.mark.parametrize("name", registry)
def test_properties(name: str) -> None:
    environment = registry[name]
    if reason := environment.unavailable():
        pytest.skip(reason)
    assert not check(environment, tasks=4, fuzz=1).faults
