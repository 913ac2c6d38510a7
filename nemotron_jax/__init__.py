"""Nemotron 3 Super in JAX: the names that notebooks use, each loaded when first asked for."""

import importlib
from typing import Any

from nemotron_jax import host

_HOMES = {
    "Budget": "nemotron_jax.decoding.wanted",
    "Engine": "nemotron_jax.decoding.engine",
    "EngineConfig": "nemotron_jax.config.engine",
    "Execution": "nemotron_jax.config.execution",
    "Lockstep": "nemotron_jax.decoding.lockstep",
    "ModelConfig": "nemotron_jax.config.model",
    "Nemotron": "nemotron_jax.model.nemotron",
    "Wanted": "nemotron_jax.decoding.wanted",
    "bytes_of": "nemotron_jax.model.packing",
    "chat": "nemotron_jax.answer",
    "for_decoding": "nemotron_jax.decoding.step",
    "generate": "nemotron_jax.decoding.generate",
    "load_pretrained": "nemotron_jax.pretrained",
    "load_tokenizer": "nemotron_jax.pretrained",
    "save_pretrained": "nemotron_jax.pretrained",
    "unpacked": "nemotron_jax.model.packing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nemotron_jax' has no attribute {name!r}")
    host.keep_compiled_programs()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
