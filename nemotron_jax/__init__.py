"""Nemotron 3 Super in JAX: the names that notebooks use, each loaded when first asked for."""

import importlib
from typing import Any

_HOMES = {
    "Engine": "nemotron_jax.decoding.engine",
    "Execution": "nemotron_jax.config.execution",
    "ModelConfig": "nemotron_jax.config.model",
    "Nemotron": "nemotron_jax.model.nemotron",
    "for_decoding": "nemotron_jax.decoding.step",
    "generate": "nemotron_jax.decoding.generate",
    "load_pretrained": "nemotron_jax.pretrained",
    "load_tokenizer": "nemotron_jax.pretrained",
    "save_pretrained": "nemotron_jax.pretrained",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nemotron_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
