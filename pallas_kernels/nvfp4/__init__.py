"""NVFP4 and MXFP8: emulated quantisation, packed codes, and the Hadamard transform."""

from pallas_kernels.nvfp4.op import (
    REACH,
    Quantized,
    dequantize,
    hadamard,
    hadamard_rows,
    pack,
    quantize,
    quantize_mxfp8,
    round_trip,
    round_trip_mxfp8,
    unpack,
)
from pallas_kernels.nvfp4.random import fold, key_words, uniform

__all__ = [
    "REACH",
    "Quantized",
    "dequantize",
    "fold",
    "hadamard",
    "hadamard_rows",
    "key_words",
    "pack",
    "quantize",
    "quantize_mxfp8",
    "round_trip",
    "round_trip_mxfp8",
    "uniform",
    "unpack",
]
