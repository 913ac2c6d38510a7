"""Precision of the weight matmuls."""

from nemotron_jax.quant.matmul import dot, expert_mlp

__all__ = ["dot", "expert_mlp"]
