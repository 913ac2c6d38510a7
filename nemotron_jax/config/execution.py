"""How a model function runs: chosen by the caller, never stored in a module."""

import dataclasses

from nemotron_jax.config.checks import check, one_of, positive
from nemotron_jax.config.precision import PrecisionConfig

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
REMAT = ("none", "full", "mixers")
LAYERS = ("auto", "scan", "unrolled")
AUX_LOSS = ("rows", "documents")
KERNELS = ("auto", "xla", "reference", "cpu", "pallas_tpu", "pallas_gpu")
KERNEL_OPS = ("attention", "causal_conv1d", "grouped_matmul", "ssd_scan")


@dataclasses.dataclass(frozen=True)
class Execution:
    """Compute dtype, rematerialisation, layer loop and kernels of one call.

    `remat`: `none` keeps every activation; `full` keeps only what flows between units and
    recomputes the rest; `mixers` keeps the inputs of each mixer, and what its experts gave, and
    recomputes what lies inside. A scan keeps no copy of a layer's weights with any of them.
    `compute_dtype`: `auto` computes in the dtype of the model's matrices. `layers`: `scan` compiles
    one unit, `unrolled` each of them; `auto` unrolls a model of few layers where a run's mesh is
    of CPUs and nothing is rematerialised, and scans others; with a cache layers are always
    unrolled. `kernels`: `auto` follows the target platform; a name holds for every op, `op=name`
    for one, as in `auto,ssd_scan=xla`. `aux_loss`: the sequence balance loss takes each row as one
    sequence (as published), or each document. `precision`: which weight matmuls run in an emulated
    low-precision format. `expert_rows`: rows that a device makes room for in a layer of experts, as
    a multiple of a balanced load; where its router sends it more, it takes them in several windows.
    (With adapters on experts, and where only one of their two matrices is in a lower format, there
    is room for all rows.)
    """

    compute_dtype: str = "auto"
    remat: str = "none"
    layers: str = "auto"
    kernels: str = "auto"
    aux_loss: str = "rows"
    precision: PrecisionConfig = PrecisionConfig()
    expert_rows: float = 1.25

    def __post_init__(self) -> None:
        one_of(self, "compute_dtype", COMPUTE_DTYPES)
        one_of(self, "remat", REMAT)
        one_of(self, "layers", LAYERS)
        pairs = [item.rpartition("=") for item in self.kernels.split(",")]
        known = all(op in ("", *KERNEL_OPS) and name in KERNELS for op, _, name in pairs)
        rule = f"names of {', '.join(KERNELS)}, or op=name with ops of {', '.join(KERNEL_OPS)}"
        check(self, "kernels", known, f"must be {rule}, separated by commas")
        one_of(self, "aux_loss", AUX_LOSS)
        positive(self, "expert_rows")

    def at_step(self, step: int) -> "Execution":
        """How the step after `step` others is computed: with that step's precision."""
        return dataclasses.replace(self, precision=self.precision.at_step(step))

    def kernel(self, op: str) -> str:
        """The implementation that `kernels` names for an op; what names the op itself wins."""
        pairs = [item.rpartition("=") for item in self.kernels.split(",")]
        chosen = {name: value for name, _, value in pairs}
        return chosen.get(op, chosen.get("", "auto"))
