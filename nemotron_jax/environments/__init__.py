"""Tasks with verified rewards, in plain Python: usable without jax and without a model."""

from nemotron_jax.environments.base import (
    Draft,
    Environment,
    InfraError,
    Session,
    Task,
    ToolError,
    Verdict,
    play,
)
from nemotron_jax.environments.catalogue import registry
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import ToolCall, Turn, calling

__all__ = [
    "Draft",
    "Draws",
    "Environment",
    "InfraError",
    "Session",
    "Task",
    "ToolCall",
    "ToolError",
    "Turn",
    "Verdict",
    "calling",
    "play",
    "registry",
    "tool",
]
