"""Kernels on plain arrays: ops with a definition, an XLA form and Pallas forms.

Each name is loaded when it is first asked for, so that `pallas_kernels.devices` needs no jax.
"""

import importlib
import sys
import types
from typing import Any

_HOMES = {
    "ExpertOrder": "grouped_matmul.routing",
    "PackedExperts": "grouped_matmul.packed",
    "attention": "attention.op",
    "causal_conv1d": "causal_conv1d.op",
    "combine_rows": "grouped_matmul.routing",
    "conv_tail": "causal_conv1d.op",
    "gather_rows": "grouped_matmul.routing",
    "grouped_matmul": "grouped_matmul.op",
    "grouped_matmul_packed": "grouped_matmul.packed",
    "grouped_matmul_packed_transposed": "grouped_matmul.packed",
    "grouped_mlp": "grouped_matmul.op",
    "grouped_mlp_gradients": "grouped_matmul.op",
    "grouped_outer": "grouped_matmul.op",
    "pack_experts": "grouped_matmul.packed",
    "quantize_experts": "grouped_matmul.packed",
    "sort_by_expert": "grouped_matmul.routing",
    "ssd_outputs": "ssd.op",
    "ssd_replay": "ssd.op",
    "ssd_scan": "ssd.op",
    "ssd_state": "ssd.op",
    "ssd_step": "ssd.op",
}

__all__ = ["nvfp4", *sorted(_HOMES)]


class _Kernels(types.ModuleType):
    """This module; a name that an op shares with its folder means the op."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
            value = getattr(home, name)
        elif name == "nvfp4":
            value = importlib.import_module(f"{__name__}.nvfp4")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a folder here as soon as a file in it is imported.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
