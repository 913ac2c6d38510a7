"""Kernels on plain arrays: ops with a definition, an XLA form and Pallas forms."""

from pallas_kernels import nvfp4
from pallas_kernels.attention.op import attention
from pallas_kernels.causal_conv1d.op import causal_conv1d
from pallas_kernels.grouped_matmul.op import (
    grouped_matmul,
    grouped_mlp,
    grouped_mlp_gradients,
    grouped_outer,
)
from pallas_kernels.grouped_matmul.packed import (
    PackedExperts,
    grouped_matmul_packed,
    pack_experts,
    quantize_experts,
)
from pallas_kernels.grouped_matmul.routing import (
    ExpertOrder,
    combine_rows,
    gather_rows,
    sort_by_expert,
)
from pallas_kernels.ssd.op import ssd_scan, ssd_state, ssd_step

__all__ = [
    "ExpertOrder",
    "PackedExperts",
    "attention",
    "causal_conv1d",
    "combine_rows",
    "gather_rows",
    "grouped_matmul",
    "grouped_matmul_packed",
    "grouped_mlp",
    "grouped_mlp_gradients",
    "grouped_outer",
    "nvfp4",
    "pack_experts",
    "quantize_experts",
    "sort_by_expert",
    "ssd_scan",
    "ssd_state",
    "ssd_step",
]
