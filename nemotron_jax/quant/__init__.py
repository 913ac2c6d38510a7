"""Precision of the weight matmuls."""

from nemotron_jax.quant.matmul import dot, dot_together, expert_mlp, row_alignment
from nemotron_jax.quant.mix import mix_in_windows, window_rows

__all__ = [
    "dot",
    "dot_together",
    "expert_mlp",
    "mix_in_windows",
    "row_alignment",
    "window_rows",
]
