"""How fast the parts of a layer run on a device, as far as it is known without running them.

Static times of this project's kernels (docs/kernels.md: Super's shapes, bfloat16, all cores; they
are bounds from below), and shares of a device's peak that are assumed where nothing is known.
"""

import dataclasses

from pallas_kernels.devices import DEVICES, Device

# Of the matrix units' peak in a compiler's dense products: assumed. On GPUs what large products
# reach in published benchmarks.
DENSE_TPU, DENSE_GPU = 0.90, 0.70
# Splash attention's forward pass, 8,192 tokens, on v5p: 2.11 ms for what takes 1.20 at peak. Its
# gradient takes 3.5 times as long: 5/2 of the FLOPs, at one core of two.
ATTENTION, ATTENTION_GRADIENT = 0.57, 3.5
# Float32 products of the router at the highest precision are six of bfloat16.
ROUTER_PASSES = 6
# Passes over arrays at the memory's speed: the routed rows (sorting, gathering, combining and their
# gradients), a block's input (norms, residuals), the convolution's input forward and backward.
ROW_PASSES, BLOCK_PASSES, CONV_FORWARD, CONV_BACKWARD = 30, 41, 2, 9.6

# What the static times are of: FLOPs of one product of Super's experts (180,224 rows, 1024 x 2688),
# of the recurrence (8,192 tokens, 8,192 channels, a state of 128), and elements quantised.
_EXPERT_FLOPS = 2 * 180_224 * 1024 * 2688
_SCAN_FLOPS = 8192 * 8192 * (5 * 128 + 2)
_ELEMENTS = 8192 * 4096
# Packed experts of decoding, up: 64 tokens unpack and multiply with 478 matrices.
_UNPACKED = 478 * 1024 * 2688
# Elsewhere XLA writes the matrix in bfloat16 and reads it again: 4.6 bytes a weight.
_UNPACK_US = {"v5p": 1518, "v5e": 3520, "v6e": 2904, "tpu7x": 2167}
# Microseconds: scan and its gradient; experts up, down, gradient of the rows, of the matrices, the
# hidden's two products; quantisation of 8192 x 4096 numbers, plain, and transformed and stochastic.
_STATIC = {
    "v5p": (513, 835, 2352, 2406, 2322, 2834, 4665, 141, 189),
    "v5e": (1136, 1854, 5480, 5604, 5410, 8517, 10_868, 322, 433),
    "v6e": (546, 1506, 2717, 2534, 2534, 4253, 5069, 249, 348),
    "tpu7x": (435, 1135, 2061, 1126, 1126, 2156, 3275, 197, 275),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Seconds of each kernel for one FLOP, or for one element that is quantised."""

    dense: float
    scan: float
    scan_backward: float
    up: float
    down: float
    rows: float
    matrices: float
    hidden: float
    quantise: float
    quantise_gradient: float
    unpack: float  # NVFP4's codes of an expert
    static: bool  # whether the kernels' own times are known for this device


def kernels_of(name: str) -> Kernels:
    """The times of a device; of one without static times, v5p's shares of peak and of memory."""
    device = DEVICES[name]
    times = _STATIC.get(name) or _like_v5p(device)
    scan, back, up, down, rows, matrices, hidden, plain, stochastic = (1e-6 * t for t in times)
    return Kernels(
        dense=1 / device.flops / (DENSE_GPU if device.is_gpu else DENSE_TPU),
        scan=scan / _SCAN_FLOPS,
        scan_backward=back / _SCAN_FLOPS,
        up=up / _EXPERT_FLOPS,
        down=down / _EXPERT_FLOPS,
        rows=rows / _EXPERT_FLOPS,
        matrices=matrices / _EXPERT_FLOPS,
        hidden=hidden / _EXPERT_FLOPS / 2,
        quantise=plain / _ELEMENTS,
        quantise_gradient=stochastic / _ELEMENTS,
        unpack=1e-6 * _UNPACK_US[name] / _UNPACKED if name in _UNPACK_US else 4.6 / device.hbm,
        static=name in _STATIC,
    )


def _like_v5p(device: Device) -> tuple[float, ...]:
    base = DEVICES["v5p"]
    ratio = base.flops / device.flops * (DENSE_TPU / DENSE_GPU if device.is_gpu else 1)
    times = _STATIC["v5p"]
    return (*(t * ratio for t in times[:7]), *(t * base.hbm / device.hbm for t in times[7:]))
