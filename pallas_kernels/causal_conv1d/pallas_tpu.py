"""The convolution's gradient on TPU in one pass: x and dy are read once, dx is written once.

XLA's forward pass already reads and writes nothing else and stays. The grid is [batch, channels,
tokens], a row's blocks of tokens from the last to the first: what the first tokens of a block send
to earlier ones is carried to the next step, and the sums over tokens stay in fast memory. Inside a
step channels are taken a register's lanes at a time, and a shift by some tokens is a rotation of
the block with the few tokens beside it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128
HALO = 16  # tokens of the neighbouring block that are at hand: a register's rows in bfloat16
TOKENS = (256, LANES)  # of a block, the largest that divides the row
CHANNELS = 1024  # of a block, at most: large enough to hide the copies' latency
SUMS = 8  # rows of sums: one a tap, then the bias

Interpret = bool | pltpu.InterpretParams


def backward(
    operands: tuple[Any, ...],
    dy: Float[Array, "B T channels"],
    *,
    activation: str | None,
    interpret: Interpret = False,
) -> tuple[Array | None, ...]:
    """Cotangents of x, weight, bias and tail, and None for the documents."""
    x, weight, bias, tail, documents = operands
    (batch, tokens, channels), width = x.shape, weight.shape[0]
    rows = next((n for n in TOKENS if tokens % n == 0), tokens)
    columns = next((n for n in range(CHANNELS, 0, -LANES) if channels % n == 0), channels)
    last = tokens // rows - 1
    block = lambda height, place: pl.BlockSpec((None, height, columns), place)
    here = block(rows, lambda b, j, c: (b, last - c, j))
    # The tokens before this block; at the row's start the tail is used in their place.
    before = block(HALO, lambda b, j, c: (b, jnp.maximum((last - c) * (rows // HALO) - 1, 0), j))
    once = block(HALO, lambda b, j, c: (b, 0, j))
    per_channel = pl.BlockSpec((SUMS, columns), lambda b, j, c: (0, j))
    reach = pl.BlockSpec((None, 1, rows), lambda b, j, c: (b, 0, last - c))
    dx, dtail, sums = pl.pallas_call(
        functools.partial(_kernel, width=width, silu=activation == "silu"),
        grid=(batch, channels // columns, last + 1),
        in_specs=[here, here, before, once, reach, per_channel],
        out_specs=[here, once, block(SUMS, lambda b, j, c: (b, 0, j))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, HALO, channels), jnp.float32),
            jax.ShapeDtypeStruct((batch, SUMS, channels), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((width, HALO, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=12 * width * x.size, bytes_accessed=3 * x.nbytes, transcendentals=x.size
        ),
        name="causal_conv1d_backward",
        interpret=interpret,
    )(x, dy, x, _halo(tail, x), _reach(documents, x, width), _taps(weight, bias))
    sums = jnp.sum(sums, axis=0)
    dbias = None if bias is None else sums[width].astype(bias.dtype)
    dtail = None if tail is None else dtail[:, HALO - width + 1 :].astype(tail.dtype)
    return dx, sums[:width].astype(weight.dtype), dbias, dtail, None


def unsupported(x: Array, weight: Array, *_: Any, activation: str | None) -> str | None:
    """Why these shapes cannot run, or None: blocks of whole registers, taps within the halo."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}; the kernel takes bfloat16 and float32"
    if x.shape[1] % LANES or x.shape[2] % LANES or not 1 < weight.shape[0] < SUMS:
        return (
            f"T={x.shape[1]}, channels={x.shape[2]}, W={weight.shape[0]}; the kernel takes "
            f"multiples of {LANES} tokens and channels, and 2 to {SUMS - 1} taps"
        )
    return None


def _kernel(
    x_ref,  # [rows, columns]
    dy_ref,  # [rows, columns]
    before_ref,  # [HALO, columns], the tokens of x before the block
    tail_ref,  # [HALO, columns], the tokens before the row
    reach_ref,  # [1, rows] int32, how many tokens back each looks
    taps_ref,  # [SUMS, columns] float32: the taps, then the bias
    dx_ref,  # [rows, columns]
    dtail_ref,  # [HALO, columns] float32
    sums_ref,  # [SUMS, columns] float32, of the row
    later_ref,  # [width, HALO, columns] float32, what later tokens send, by how far; carried
    *,
    width,
    silu,
):
    rows, columns = x_ref.shape
    first = pl.program_id(2) == pl.num_programs(2) - 1  # of the row's blocks

    @pl.when(pl.program_id(2) == 0)
    def _():
        later_ref[...] = jnp.zeros_like(later_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    lanes = min(LANES, columns)
    reach = jnp.transpose(jnp.broadcast_to(reach_ref[...], (8, rows)))[:, :1]

    def part(j: Any) -> None:
        own = pl.ds(pl.multiple_of(j * lanes, lanes), lanes)
        taps = taps_ref[:, own]
        halo = jnp.where(first, tail_ref[:, own], before_ref[:, own]).astype(jnp.float32)
        joined = jnp.concatenate([halo, x_ref[:, own].astype(jnp.float32)])
        inputs = []
        for back in range(width):
            shifted = (pltpu.roll(joined, back, 0) if back else joined)[HALO:]
            inputs.append(jnp.where(reach >= back, shifted, 0) if back else shifted)
        dpre = dy_ref[:, own].astype(jnp.float32)
        if silu:
            pre = taps[width : width + 1]
            for back, shifted in enumerate(inputs):
                pre = pre + shifted * taps[width - 1 - back : width - back]
            gate = jax.nn.sigmoid(pre)
            dpre = dpre * gate * (1 + pre * (1 - gate))
        sums = [jnp.sum(dpre * inputs[width - 1 - tap], axis=0) for tap in range(width)]
        sums.append(jnp.sum(dpre, axis=0))
        sums += [jnp.zeros_like(sums[0])] * (SUMS - len(sums))
        sums_ref[:, own] += jnp.stack(sums)
        dx, dtail = dpre * taps[width - 1 : width], jnp.zeros((HALO, lanes), jnp.float32)
        for back in range(1, width):
            sent = jnp.where(reach >= back, dpre, 0) * taps[width - 1 - back : width - back]
            size = rows + HALO
            joined = jnp.concatenate([sent, later_ref[back, :, own]])
            dx += pltpu.roll(joined, size - back, 0)[:rows]
            start = joined[:HALO]
            later_ref[back, :, own] = start
            start = jnp.concatenate([jnp.zeros_like(start), start])
            dtail += pltpu.roll(start, 2 * HALO - back, 0)[:HALO]
        dx_ref[:, own] = dx.astype(dx_ref.dtype)
        dtail_ref[:, own] = dtail  # the last to write is the row's first block

    pl.loop(0, columns // lanes)(part)


def _halo(tail: Array | None, x: Array) -> Float[Array, "B HALO channels"]:
    """The tokens before the row, zeros before those of the tail."""
    if tail is None:
        return jnp.zeros((x.shape[0], HALO, x.shape[2]), x.dtype)
    return jnp.pad(tail.astype(x.dtype), ((0, 0), (HALO - tail.shape[1], 0), (0, 0)))


def _reach(documents: Array | None, x: Array, width: int) -> Int[Array, "B 1 T"]:
    """How many tokens back each token's taps look, the row's first document past its start."""
    batch, tokens, _ = x.shape
    if documents is None:
        return jnp.full((batch, 1, tokens), width - 1, jnp.int32)
    place = jnp.arange(tokens, dtype=jnp.int32)
    starts = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
    begin = lax.cummax(jnp.where(starts, place, 1 - width), axis=1)
    return jnp.minimum(place - begin, width - 1)[:, None]


def _taps(weight: Array, bias: Array | None) -> Float[Array, "SUMS channels"]:
    bias = jnp.zeros(weight.shape[1:], jnp.float32) if bias is None else bias.astype(jnp.float32)
    rows = jnp.concatenate([weight.astype(jnp.float32), bias[None]])
    return jnp.pad(rows, ((0, SUMS - rows.shape[0]), (0, 0)))
