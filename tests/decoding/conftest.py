"""Engines whose device is made of dictionaries, for laws of queue, pages and slots."""

import functools
from collections.abc import Callable

import pytest

from nemotron_jax.decoding import engine as engine_module
from nemotron_jax.decoding.engine import Engine
from tests.decoding.engines import make, old_model
from tests.decoding.fake_runner import FakeRunner


@pytest.fixture
def fake(monkeypatch) -> Callable[..., Engine]:
    """Makes engines that compile nothing."""
    monkeypatch.setattr(engine_module, "Runner", FakeRunner)
    return functools.partial(make, old_model())
