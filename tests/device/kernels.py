"""Every kernel on the device at hand: against its definition, and beside its XLA form and floor."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
    ref_ragged_paged_attention,
)

from pallas_kernels import (
    attention,
    causal_conv1d,
    dispatch,
    grouped_matmul,
    grouped_matmul_packed,
    grouped_mlp,
    grouped_outer,
    nvfp4,
    pack_experts,
    ssd_scan,
)
from pallas_kernels.attention import op as attention_op
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.attention import splash
from pallas_kernels.causal_conv1d import specs as conv_specs
from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul import specs as grouped_specs
from pallas_kernels.proofs import Proof
from pallas_kernels.ssd import specs as ssd_specs
from pallas_kernels.testing import outputs_and_gradients

REPETITIONS = 5  # the fastest counts
KERNEL, DEFINITION = "pallas_tpu", "reference"
# Relative errors in L2. Interpreted, both sum in float32. A device's exponentials and products of
# three bfloat16 passes may differ by more; a kernel that is wrong is off by tenths.
LIMITS = {True: 1e-4, False: 1e-2}
NARROW = 1e-2  # of bfloat16 operands: a few roundings of 2^-9
Check = tuple[str, Callable[..., Any], dict[str, Any], tuple[str, ...]]


def checks(interpreted: bool) -> Iterator[Check]:
    """A kernel's name, its op by `implementation`, its operands, and the names of its results."""
    case = ssd_specs.Case(
        "rows", 2, 256, 16, 64, 2, 128, starts=((5, 128, 200), (33,)), lengths=(256, 190)
    )
    yield "ssd_scan", ssd_scan, {**case.arrays(), **case.rows()}, ("y", "state")
    case = attention_specs.Case(
        "rows", 2, 256, 4, 2, 128, starts=((1, 30, 128), (60,)), lengths=(256, 70)
    )
    narrow = case.arrays(dtype=jnp.bfloat16)  # it takes no other
    op = _interpreted_attention if interpreted else attention
    yield "attention", op, {**narrow, **case.rows()}, ("output",)
    case = conv_specs.Case("rows", 2, 256, 256, starts=((9, 60), (1, 2, 3)), lengths=(200, 256))
    yield "causal_conv1d", causal_conv1d, {**case.arrays(), **case.rows()}, ("y", "tail")
    case = grouped_specs.Case("groups", 384, 128, 256, (0, 100, 7, 0, 200, 61))
    arrays = case.matmul_arrays()
    yield "grouped_matmul", grouped_matmul, arrays, ("output",)
    turned = functools.partial(grouped_matmul, transpose_rhs=True)
    arrays = {**arrays, "rhs": np.swapaxes(arrays["rhs"], 1, 2)}
    yield "grouped_matmul, transposed", turned, arrays, ("output",)
    yield "grouped_mlp", grouped_mlp, case.mlp_arrays(), ("output",)
    outer = {"lhs": arrays["lhs"], "dout": np.roll(arrays["lhs"], 1, 0)}
    yield "grouped_outer", grouped_outer, {**outer, "group_sizes": arrays["group_sizes"]}, ("out",)


def checked(interpreted: bool) -> Iterator[dict]:
    """A row for each kernel: its worst error, of values and gradients, and whether that holds."""
    for name, op, arrays, outputs in checks(interpreted):
        differentiable = name != "grouped_outer"
        with _mode(interpreted and op is not _interpreted_attention):
            found = {
                which: _results(op, which, arrays, outputs, differentiable)
                for which in (KERNEL, DEFINITION)
            }
        errors = {
            key: distance(found[KERNEL][key], value) for key, value in found[DEFINITION].items()
        }
        worst = max(errors, key=lambda key: (np.isnan(errors[key]), errors[key]))
        narrow = any(one.dtype == jnp.bfloat16 for one in arrays.values())
        holds = bool(errors[worst] <= (NARROW if narrow else LIMITS[interpreted]))
        yield {"kernel": name, "error": errors[worst], "of": worst, "holds": holds}
    yield from _others(interpreted)


def _mode(interpreted: bool) -> contextlib.AbstractContextManager:
    return pltpu.force_tpu_interpret_mode() if interpreted else contextlib.nullcontext()


def _others(interpreted: bool) -> Iterator[dict]:
    yield _over_pages(interpreted)
    with _mode(interpreted):
        yield from _of_codes(interpreted)


def _of_codes(interpreted: bool) -> Iterator[dict]:
    """Rows of the kernels that make or read NVFP4."""
    yield _packed(interpreted)
    yield _quantized()
    for block, options in (
        ((1, 16), {}),
        ((16, 16), {}),
        ((16, 1), {"rounding": "stochastic", "words": jnp.array([3, 4], jnp.uint32)}),
        ((16, 1), {"hadamard": True}),
    ):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)), jnp.float32)
        trip = functools.partial(nvfp4.round_trip, x, block=block, **options)
        kernel, xla = (
            jax.jit(functools.partial(trip, implementation=n))() for n in (KERNEL, "xla")
        )
        differ = float(np.mean(np.asarray(kernel) != np.asarray(xla)))
        words = ", ".join(["nvfp4", f"{block[0]}x{block[1]}", *map(str, options)])
        # The transform is a product; where it is rounded otherwise, a number may take another code.
        most = 1e-3 if "hadamard" in options else 0.0
        yield {"kernel": words, "error": differ, "of": "share of codes", "holds": differ <= most}


def distance(got: Any, expected: Any) -> float:
    """Relative, in L2; not a number where one of them is none."""
    got, expected = (np.asarray(one, np.float64) for one in (got, expected))
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def timed(proof: Proof, device: Device) -> dict:
    """Milliseconds of a kernel and of its XLA form at a published shape, and the floor: what its
    operations, or its bytes, take at the device's published speeds."""
    operands = [_filled(proof, place) for place in range(len(proof.operands))]
    floor = 1e3 * max(proof.flops / device.flops, proof.bytes / device.hbm)
    row = {"kernel": proof.kernel, "direction": proof.direction, "shape": proof.shape}
    row |= {"floor_ms": floor, "ms": None, "xla_ms": None, "why": ""}
    for name, run in (("ms", proof.run), ("xla_ms", proof.plain)):
        if run is None:
            continue
        try:
            row[name] = _milliseconds(run, operands)
        except Exception as error:  # a form that does not fit is a figure too
            row["why"] = f"{name}: {' '.join(str(error).split())[:200]}"
    return row


def _results(
    op: Callable[..., Any], which: str, arrays: dict, outputs: tuple, differentiable: bool
) -> dict[str, Any]:
    run = functools.partial(op, implementation=which)
    if which == DEFINITION:
        wide = lambda one: one.astype(np.float32) if one.dtype == jnp.bfloat16 else one
        arrays = {name: wide(one) for name, one in arrays.items()}
    # A TPU's product of float32 is one of bfloat16 unless it is asked for more.
    precision = "highest" if which == DEFINITION else None
    with jax.default_matmul_precision(precision):
        if not differentiable:
            return {outputs[0]: jax.jit(run)(**arrays)}
        values, gradients = outputs_and_gradients(run, arrays, outputs, seed=0)
    return {**values, **{f"gradient of {name}": one for name, one in gradients.items()}}


def _interpreted_attention(*operands: Any, implementation: str, **options: Any) -> Any:
    """JAX's kernel is not run by `force_tpu_interpret_mode`, but by an argument of its own."""
    table = attention_op.ATTENTION.implementations
    run, outputs = (
        functools.partial(function, interpret=True) for function in (splash.forward, splash.outputs)
    )
    table["interpreted"] = dispatch.Implementation(run, splash.backward, outputs=outputs)
    name = "interpreted" if implementation == KERNEL else implementation
    return attention(*operands, implementation=name, **options)


def _packed(interpreted: bool) -> dict:
    rng, experts, depth, width = np.random.default_rng(0), 4, 128, 256
    codes = jnp.asarray(rng.integers(0, 16, (experts, depth, width)), jnp.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 4, (experts, depth // 16, width)), jnp.float8_e4m3fn)
    packed = pack_experts(codes, scales, jnp.asarray(rng.uniform(0.5, 2, experts), jnp.float32))
    lhs = jnp.asarray(rng.standard_normal((96, depth)), jnp.float32)
    sizes = jnp.array([10, 0, 70, 16], jnp.int32)
    run = functools.partial(grouped_matmul_packed, lhs, packed, sizes)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(run, implementation="xla"))()
    error = distance(jax.jit(functools.partial(run, implementation=KERNEL))(), expected)
    holds = error <= LIMITS[interpreted]
    return {"kernel": "grouped_matmul_packed", "error": error, "of": "output", "holds": holds}


def _quantized() -> dict:
    """Codes of weights, two of them in a byte, their scales, and the codes taken apart again."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)), jnp.bfloat16)

    def run(which: str, x: Array) -> tuple[Array, ...]:
        made = nvfp4.quantize(x, block=(1, 16), implementation=which)
        apart = nvfp4.unpack(made.codes, implementation=which)
        again = nvfp4.pack(apart, implementation=which)
        return made.codes, jax.lax.bitcast_convert_type(made.scales, jnp.uint8), apart, again

    found = (jax.jit(functools.partial(run, name))(x) for name in (KERNEL, "xla"))
    differ = max(float(np.mean(np.asarray(a) != np.asarray(b))) for a, b in zip(*found))
    return {"kernel": "nvfp4, codes", "error": differ, "of": "share of bytes", "holds": not differ}


def _over_pages(interpreted: bool) -> dict:
    """Some tokens of rows that lie in pages; no interpreter takes JAX's kernel, so that there its
    own definition stands in its place."""
    rng, rows, width, page, heads = np.random.default_rng(0), 3, 6, 64, 4
    q = jnp.asarray(rng.standard_normal((rows, 5, heads, 128)), jnp.bfloat16)
    pool = jnp.asarray(rng.standard_normal((rows * width + 1, page, heads, 128)), jnp.bfloat16)
    table = jnp.asarray(rng.permutation(rows * width).reshape(rows, width) + 1, jnp.int32)
    before = jnp.array([0, 120, width * page - 5], jnp.int32)
    run = functools.partial(attention, pages=table, q_offset=before)
    with jax.default_matmul_precision("highest"):
        wide = q.astype(jnp.float32), pool.astype(jnp.float32)
        expected = run(*wide, implementation=DEFINITION)
    with _jax_definition() if interpreted else contextlib.nullcontext():
        error = distance(run(q, pool, implementation=KERNEL), expected)
    row = {"kernel": "attention over pages", "error": error, "of": "output"}
    return row | {"holds": error <= NARROW}


@contextlib.contextmanager
def _jax_definition() -> Iterator[None]:
    kernel = ragged.ragged_paged_attention
    taken = ("sm_scale", "k_scale", "v_scale")

    def defined(*operands: Array, **options: Any) -> Array:
        return ref_ragged_paged_attention(*operands, **{name: options[name] for name in taken})

    ragged.ragged_paged_attention = defined
    try:
        yield
    finally:
        ragged.ragged_paged_attention = kernel


def _filled(proof: Proof, place: int) -> jax.Array:
    """Values of an operand: those that the proof gives, rows spread evenly over groups, one
    document, small numbers else."""
    like = proof.operands[place]
    if place in proof.given:
        return jnp.asarray(proof.given[place], like.dtype)
    if like.dtype == jnp.int32:
        grouped = proof.kernel.startswith("grouped") and like.ndim == 1
        each = proof.operands[0].shape[0] // like.shape[0] if grouped else 0
        return jnp.full(like.shape, each, jnp.int32)
    if jnp.issubdtype(like.dtype, jnp.integer):
        return jnp.full(like.shape, 3, like.dtype)
    draw = np.random.default_rng(0).standard_normal(like.shape, np.float32)
    return jnp.asarray(0.1 * draw if like.ndim else 1.0).astype(like.dtype)


def _milliseconds(run: Callable[..., Any], operands: list) -> float:
    program, times = jax.jit(run), []
    jax.block_until_ready(program(*operands))
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        jax.block_until_ready(program(*operands))
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)
