"""Time every op at the shapes of its specifications on the device that is here.

python -m pallas_kernels.bench [--ops=NAME,...] [--implementation=NAME] [--json=FILE]. A row a case
and direction: milliseconds, the floor, and their ratio. The floor is what the case's operations and
bytes take at the speeds that this device shows in a matrix product and in a copy; a case whose
floor is above --most_seconds is not timed.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention, causal_conv1d, grouped_mlp, nvfp4, ssd_scan
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.causal_conv1d import specs as conv_specs
from pallas_kernels.grouped_matmul import specs as routing_specs
from pallas_kernels.report import report_file
from pallas_kernels.ssd import specs as ssd_specs

REPETITIONS = 5  # the fastest counts: others on the machine only ever add
WORD = 4  # bytes: operands are float32


@dataclasses.dataclass(frozen=True)
class Bench:
    """One op at one shape.

    `make` draws its operands by name. `flops` are the forward direction's, and `words` those of its
    operands and results.
    """

    op: str
    shape: str
    run: Callable[..., Any]
    make: Callable[[], dict[str, np.ndarray]]
    flops: float
    words: float
    differentiable: bool = True


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device does at best: float32 operations and bytes a second."""

    flops: float
    bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Time as the arguments say; the exit status."""
    flags = _parser().parse_args(arguments)
    options = {"implementation": flags.implementation} if flags.implementation else {}
    speed, rows = measured_speed(), []
    device = jax.devices()[0].device_kind
    print(f"{device}: {speed.flops / 1e9:,.0f} GFLOP/s, {speed.bytes / 1e9:,.1f} GB/s")
    print(f"{'op':16}{'shape':12}{'direction':12}{'ms':>10}{'floor':>10}{'ratio':>8}")
    for bench in benches(**options):
        if flags.ops and bench.op not in flags.ops.split(","):
            continue
        for row in timed(bench, speed, flags.most_seconds):
            rows.append({**row, "device": device, **options})
            print(line(row), flush=True)
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return 0


def benches(**options: str) -> Iterator[Bench]:
    """Every named shape of every op; options go to all of them."""
    bind = lambda op, **more: lambda **arrays: op(**arrays, **options, **more)
    for name, case in ssd_specs.SHAPES.items():
        tokens = case.batch * case.tokens
        # A decay, a product and a sum bring the state on; a product and a sum read it.
        flops = 5.0 * tokens * case.heads * case.head_dim * case.state_size
        each = 2 * case.heads * case.head_dim + case.heads + 2 * case.groups * case.state_size
        make = lambda case=case: {**case.arrays(), **case.rows()}
        yield Bench("ssd_scan", name, bind(ssd_scan), make, flops, tokens * each)
    for name, case in attention_specs.SHAPES.items():
        keys = case.keys or case.tokens
        seen = case.keys or (case.tokens + 1) / 2
        flops = 4.0 * case.batch * case.heads * case.tokens * seen * case.head_dim
        heads = 2 * case.tokens * case.heads + 2 * keys * case.kv_heads
        make = lambda case=case: {**case.arrays(), **case.rows()}
        words = case.batch * heads * case.head_dim
        trains = case.keys is None
        yield Bench("attention", name, bind(attention), make, flops, words, trains)
    for name, case in conv_specs.SHAPES.items():
        inputs = case.batch * case.tokens * case.channels
        make = lambda case=case: {**case.arrays(), **case.rows()}
        run = lambda **arrays: causal_conv1d(**arrays, **options)[0]
        yield Bench("causal_conv1d", name, run, make, 2.0 * case.width * inputs, 2 * inputs)
    for name, routing in routing_specs.SHAPES.items():
        rows, matrix = routing.tokens * routing.choices, routing.latent * routing.hidden
        words = 2 * rows * routing.latent + 2 * routing.experts * matrix
        make = lambda routing=routing: _experts(routing)
        yield Bench("grouped_mlp", name, bind(grouped_mlp), make, 4.0 * rows * matrix, words)
    for name, shape in {"super": (8192, 4096), "tiny": (2048, 128)}.items():
        make = lambda shape=shape: {"x": np.random.default_rng(0).normal(size=shape).astype("f4")}
        run = bind(nvfp4.round_trip, block=(1, 16))
        yield Bench("nvfp4", name, run, make, 0.0, 2.0 * shape[0] * shape[1], False)


def timed(bench: Bench, speed: Machine, most_seconds: float) -> Iterator[dict]:
    """A row for each direction of one op at one shape."""
    arrays = None
    for direction in ("forward", "backward") if bench.differentiable else ("forward",):
        times = 1 if direction == "forward" else 3  # a backward pass has the forward's in it
        floor = times * max(bench.flops / speed.flops, WORD * bench.words / speed.bytes)
        row = {
            "op": bench.op,
            "shape": bench.shape,
            "direction": direction,
            "milliseconds": None,
            "floor_milliseconds": 1e3 * floor,
            "ratio": None,
        }
        if floor <= most_seconds:
            arrays = jax.tree.map(jnp.asarray, bench.make()) if arrays is None else arrays
            seconds = _seconds(_program(bench, direction), arrays)
            row |= {"milliseconds": 1e3 * seconds, "ratio": seconds / floor}
        yield row


def line(row: dict) -> str:
    """A row as a line for a terminal."""
    text = f"{row['op']:16}{row['shape']:12}{row['direction']:12}"
    if row["milliseconds"] is None:
        return f"{text}{'not timed':>10}{row['floor_milliseconds']:>10.2f}"
    return (
        f"{text}{row['milliseconds']:>10.2f}{row['floor_milliseconds']:>10.2f}{row['ratio']:>8.1f}"
    )


def measured_speed() -> Machine:
    """The device's, in a float32 product of 1024 x 1024 and in a pass over 64 MB."""
    matrix, vector = jnp.ones((1024, 1024), jnp.float32), jnp.ones(2**24, jnp.float32)
    product = _seconds(jax.jit(lambda a: jnp.dot(a, a, precision="highest")), {"a": matrix})
    copy = _seconds(jax.jit(lambda a: a + 1), {"a": vector})
    return Machine(2 * 1024**3 / product, 2 * vector.nbytes / copy)


def _program(bench: Bench, direction: str) -> Callable[..., Any]:
    if direction == "forward":
        return jax.jit(bench.run)

    def loss(variables: dict, constants: dict) -> Any:
        outputs = jax.tree.leaves(bench.run(**variables, **constants))
        return sum(jnp.sum(jnp.sin(one.astype(jnp.float32))) for one in outputs)

    def backward(**arrays: Any) -> Any:
        floating = {k: a for k, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        return jax.grad(loss)(floating, {k: a for k, a in arrays.items() if k not in floating})

    return jax.jit(backward)


def _seconds(program: Callable[..., Any], arrays: dict) -> float:
    jax.block_until_ready(program(**arrays))
    times = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        jax.block_until_ready(program(**arrays))
        times.append(time.perf_counter() - begin)
    return min(times)


def _experts(routing: routing_specs.Routing) -> dict[str, np.ndarray]:
    """Sorted rows of a routed layer, and its experts."""
    index = routing.expert_index().reshape(-1)
    sizes = tuple(np.bincount(index, minlength=routing.experts).tolist())
    case = routing_specs.Case("", index.size, routing.latent, routing.hidden, sizes)
    return case.mlp_arrays()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    add = parser.add_argument
    add("--ops", default="", help="names of ops, with commas; all by default")
    add("--implementation", default="", help="such as xla; the device's own by default")
    add("--most_seconds", type=float, default=0.3, help="floors above it are not timed")
    add("--json", default="", type=report_file, help="a file for the rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
