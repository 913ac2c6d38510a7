"""What is proven of the grouped products: every kernel at the published shapes, in bfloat16."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import lanes, op, packed, packed_tpu, pallas_tpu, pieces, specs
from pallas_kernels.proofs import Proof, nbytes

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
DECODED = 64  # sequences that are decoded together, a token of each


def proofs() -> Iterator[Proof]:
    """Super's and Nano's experts, with loads as skewed as lognormal(1) makes them."""
    for name in ("super", "nano"):
        routing = specs.SHAPES[name]
        rows = routing.tokens * routing.choices
        sizes = _skewed(rows, routing.experts)
        narrow = jax.ShapeDtypeStruct((rows, routing.latent), BF16)
        wide = jax.ShapeDtypeStruct((rows, routing.hidden), BF16)
        up = jax.ShapeDtypeStruct((routing.experts, routing.latent, routing.hidden), BF16)
        down = jax.ShapeDtypeStruct((routing.experts, routing.hidden, routing.latent), BF16)
        groups = jax.ShapeDtypeStruct(sizes.shape, I32)
        turned = lanes.lies_turned(up)
        first = jax.ShapeDtypeStruct((up.shape[0], *up.shape[:0:-1]), BF16) if turned else up
        options = {"transpose_rhs": turned, "activation": "relu2"}
        yield _product(name, "forward, up", narrow, first, groups, sizes, **options)
        yield _product(name, "forward, down", wide, down, groups, sizes)
        yield _product(name, "of rows", wide, up, groups, sizes, transpose_rhs=True)
        yield _outer(name, narrow, wide, groups, sizes)
        yield _hidden(name, (narrow, up, down, groups, narrow), sizes)
        yield from _packed(name, routing)
        yield _packed_rows(name, wide, routing.latent, sizes)


def _skewed(rows: int, experts: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    wanted = rng.lognormal(0, 1, experts)
    return rng.multinomial(rows, wanted / wanted.sum())


def _product(name, direction, lhs, rhs, groups, sizes, *, transpose_rhs=False, activation=None):
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    out = jax.ShapeDtypeStruct((lhs.shape[0], width), lhs.dtype)
    options = {"transpose_rhs": transpose_rhs}
    height = pallas_tpu.tile_rows(
        lhs.shape[0], 2 * (lhs.shape[1] + width), 2 * math.prod(rhs.shape[1:])
    )
    visits = _visits(sizes, lhs.shape[0], height)
    plain = functools.partial(op.grouped_matmul, implementation="xla", **options)
    return Proof(
        kernel="grouped_matmul_transposed" if transpose_rhs else "grouped_matmul",
        direction=direction,
        shape=name,
        run=functools.partial(pallas_tpu.matmul, activation=activation, **options),
        operands=(lhs, rhs, groups),
        flops=2 * lhs.size * width,
        bytes=nbytes(lhs, rhs, out),
        steps=len(visits),
        branches=_branches(visits, height, len({tile for tile, _, _ in visits}), (width,)),
        multiplied_flops=2 * _multiplied_rows(visits, height) * lhs.shape[1] * width,
        plain=plain if activation is None else None,
    )


def _outer(name, lhs, dout, groups, sizes):
    rows, depth = lhs.shape
    width = dout.shape[1]
    out = jax.ShapeDtypeStruct((len(sizes), depth, width), F32)
    height = pallas_tpu.tile_rows(rows, 2 * (depth + width), 4 * depth * width)
    visits = _visits(sizes, rows, height)
    return Proof(
        kernel="grouped_outer",
        direction="of matrices",
        shape=name,
        run=pallas_tpu.outer,
        operands=(lhs, dout, groups),
        flops=2 * rows * depth * width,
        bytes=nbytes(lhs, dout, out),
        steps=len(visits),
        branches=_branches(
            *(visits, height, int(np.sum(sizes == 0)), (depth, width)), pieces.DEEP, pieces.WIDER
        ),
        multiplied_flops=2 * _multiplied_rows(visits, height, pieces.DEEP) * depth * width,
        plain=functools.partial(op.grouped_outer, implementation="xla"),
    )


def _hidden(name, operands, sizes):
    lhs, up = operands[:2]
    rows, width, hidden = lhs.shape[0], lhs.shape[1], up.shape[2]
    out = jax.ShapeDtypeStruct((rows, hidden), lhs.dtype)
    height = pallas_tpu.tile_rows(rows, 4 * (width + hidden), 4 * width * hidden)
    visits = _visits(sizes, rows, height)
    return Proof(
        kernel="grouped_hidden_gradient",
        direction="of hidden",
        shape=name,
        run=pallas_tpu.hidden_gradient,
        operands=operands,
        flops=4 * rows * width * hidden,
        bytes=nbytes(operands, out, out),
        steps=len(visits),
        branches=_branches(visits, height, len({tile for tile, _, _ in visits}), (hidden,)),
        multiplied_flops=4 * _multiplied_rows(visits, height) * width * hidden,
    )


def _packed(name: str, routing: specs.Routing) -> Iterator[Proof]:
    """Both products of a layer in decoding, one token of each of `DECODED` rows, packed experts."""
    index = dataclasses.replace(routing, tokens=DECODED).expert_index()
    sizes = np.bincount(index.reshape(-1), minlength=routing.experts)
    used = int(np.count_nonzero(sizes))
    shape = jax.ShapeDtypeStruct
    for direction, depth, width, activation in (
        ("decode, up", routing.latent, routing.hidden, "relu2"),
        ("decode, down", routing.hidden, routing.latent, None),
    ):
        experts = _codes(routing.experts, depth, width)
        blocks = experts[1].shape[1]
        lhs, out = shape((index.size, depth), BF16), shape((index.size, width), BF16)
        height = packed_tpu.tile_rows(index.size, 2, blocks * packed_tpu.BLOCK, width)
        visits = _visits(sizes, index.size, height)
        cleared, loop, *rests = _branches(
            visits, height, len({tile for tile, _, _ in visits}), (width,)
        )
        made = used, blocks // packed_tpu.SUBLANES, width // pieces.column_width(width)
        run = functools.partial(packed.PACKED, activation=activation)
        yield Proof(
            kernel="grouped_matmul_packed",
            direction=direction,
            shape=name,
            run=functools.partial(run, implementation="pallas_tpu"),
            operands=(lhs, *experts, shape(sizes.shape, I32)),
            flops=2 * lhs.size * width,
            bytes=nbytes(lhs, out) + nbytes(experts) * used // routing.experts,
            steps=len(visits),
            branches=(made, cleared, loop, *rests),
            multiplied_flops=2 * _multiplied_rows(visits, height) * lhs.shape[1] * width,
            plain=functools.partial(run, implementation="xla"),
        )


def _packed_rows(name: str, dout: jax.ShapeDtypeStruct, depth: int, sizes: np.ndarray) -> Proof:
    """The gradient of training's rows through up's codes."""
    rows, width = dout.shape
    experts, count = _codes(len(sizes), depth, width), len(sizes)
    blocks = experts[1].shape[1]
    made = blocks * packed_tpu.BLOCK
    visits = _visits(sizes, rows, height := packed_tpu.tile_rows(rows, 2, made, width))
    branches = _branches(visits, height, len({tile for tile, _, _ in visits}), (made,))
    matrices = count, blocks // packed_tpu.SUBLANES, width // pieces.column_width(width)
    run = functools.partial(packed.TRANSPOSED, depth=depth)
    out = jax.ShapeDtypeStruct((rows, depth), BF16)
    return Proof(
        kernel="grouped_matmul_packed_transposed",
        direction="of rows",
        shape=name,
        run=functools.partial(run, implementation="pallas_tpu"),
        operands=(dout, *experts, jax.ShapeDtypeStruct(sizes.shape, I32)),
        flops=2 * dout.size * depth,
        bytes=nbytes(dout, *experts, out),
        steps=len(visits),
        branches=(matrices, *branches),
        multiplied_flops=2 * _multiplied_rows(visits, height) * width * made,
        plain=functools.partial(run, implementation="xla"),
    )


def _codes(experts: int, depth: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Words, scales and factors of packed experts."""
    blocks = -(-depth // packed_tpu.DEPTH) * packed_tpu.SUBLANES
    shape = jax.ShapeDtypeStruct
    return (
        shape((experts, 2, blocks, width), F32),
        shape((experts, blocks, width), jnp.float8_e4m3fn),
        shape((experts,), F32),
    )


def _visits(sizes: np.ndarray, rows: int, height: int) -> list[tuple[int, int, int]]:
    """Tile, first row and last of every visit that has rows; the rows are counted in the tile."""
    ends = np.minimum(np.cumsum(sizes), rows)
    found = []
    for begin, end in zip(np.append(0, ends[:-1]), ends):
        if begin == end:
            continue
        for tile in range(begin // height, -(-end // height)):
            low, high = max(begin, tile * height), min(end, (tile + 1) * height)
            found.append((tile, low - tile * height, high - tile * height))
    return found


def _pieces(visits: list, height: int, step: int) -> tuple[int, list[int]]:
    """Whole pieces of all visits, and how many there are of each height that takes the rest."""
    large = min(pieces.LARGE, height)
    whole, rests = 0, [0] * -(-large // step)
    for _, low, high in visits:
        covered = high - low // pieces.ALIGN * pieces.ALIGN
        whole += covered // large
        if rest := covered % large:
            rests[-(-rest // step) - 1] += 1
    return whole, rests


def _multiplied_rows(visits: list, height: int, step: int = pieces.STEP) -> int:
    whole, rests = _pieces(visits, height, step)
    large = min(pieces.LARGE, height)
    return whole * large + sum(count * (place + 1) * step for place, count in enumerate(rests))


def _branches(
    visits: list,
    height: int,
    cleared: int,
    sides: Sequence[int],
    step: int = pieces.STEP,
    widths: Sequence[int] = pieces.WIDTHS,
) -> tuple[tuple[float, ...], ...]:
    """Of a step: a block is cleared, whole pieces are looped over, and one of some height takes
    the rest; a piece loops over blocks of each side."""
    whole, rests = _pieces(visits, height, step)
    # What no whole block holds stands beside the loop, and one block alone makes none.
    blocks = [side // pieces.column_width(side, widths) for side in sides]
    trips = [count for count in blocks if count > 1]
    loop = (len(visits), whole / len(visits), *trips)
    return (cleared,), loop, *((count, *trips) for count in rests)
