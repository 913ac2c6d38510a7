"""Precision of the weight matmuls."""

from nemotron_jax.quant.matmul import dot, dot_together, expert_mlp, row_alignment

__all__ = ["dot", "dot_together", "expert_mlp", "row_alignment"]
