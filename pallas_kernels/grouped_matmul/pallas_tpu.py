"""Grouped products on TPU: one visit of a tile of rows by one expert is one step of the grid.

The grid is [cores, visits]; the visits' tables are read as scalars before the step, so that the
pipeline fetches the next expert's whole matrix while this one multiplies, and fetches it once for
all the tiles of its group. Rows go through the matrix unit in pieces: what the last of a group has
too many is all the work that padding adds.
An output tile stays in fast memory from its first visit to its last, each of which replaces its
own rows only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import lanes, pieces
from pallas_kernels.grouped_matmul.visits import Visits, by_expert, by_tile

NARROWEST = 128  # rows and columns of a matrix unit: what is smaller leaves most of it empty
TILE_ROWS = (1024, 512, 256, 128)  # heights of a tile, the highest that fits being taken
# Of fast memory, in bytes: the least any supported chip has (TPU v7x, 64 MiB) less the compiler's.
VMEM_LIMIT = 60 * 2**20
VMEM_BLOCKS = 48 * 2**20  # for pipelined blocks and scratch; products and spills take the rest

Interpret = bool | pltpu.InterpretParams


def matmul(
    lhs: Float[Array, "rows K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"] | None = None,
    *,
    transpose_rhs: bool,
    activation: str | None = None,
    interpret: Interpret = False,
) -> Float[Array, "rows N"]:
    """Rows times their expert's matrix, or its transpose, in lhs's dtype; zeros past the groups.

    `scale` multiplies each product by its expert's number, and `activation` "relu2" squares what
    is positive of it, both in float32 before the only rounding.
    """
    rows, depth = lhs.shape
    rhs = _like_rows(rhs, lhs)
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    matrix = rhs[0].size * rhs.dtype.itemsize
    height = tile_rows(rows, (depth + width) * lhs.dtype.itemsize, matrix)
    visits = by_tile(group_sizes, rows, height)
    kernel = functools.partial(
        _matmul_kernel,
        bound=visits.bound,
        transpose_rhs=transpose_rhs,
        scaled=scale is not None,
        activation=activation,
    )
    scales = () if scale is None else (scale.astype(jnp.float32),)
    call = over_visits(
        kernel,
        visits,
        scalars=len(scales),
        inputs=[tile_block(height, depth), matrix_block(rhs.shape)],
        outputs=[tile_block(height, width)],
        shapes=[jax.ShapeDtypeStruct((rows, width), lhs.dtype)],
        cost=(2 * rows * rhs[0].size, lhs.nbytes + rhs.nbytes + rows * width * lhs.dtype.itemsize),
        name="grouped_matmul_transposed" if transpose_rhs else "grouped_matmul",
        interpret=interpret,
    )
    return call(*visits.tables(), *scales, lhs, rhs)[0]


def outer(
    lhs: Float[Array, "rows K"],
    dout: Float[Array, "rows N"],
    group_sizes: Int[Array, "E"],
    scale: Float[Array, "E"] | None = None,
    *,
    interpret: Interpret = False,
) -> Float[Array, "E K N"]:
    """Each group's lhsᵀ dout in float32, times its number of `scale`; zeros for an empty group."""
    rows, depth = lhs.shape
    experts, width = group_sizes.shape[0], dout.shape[1]
    row_bytes = depth * lhs.dtype.itemsize + width * dout.dtype.itemsize
    height = tile_rows(rows, row_bytes, 4 * depth * width)
    visits = by_expert(group_sizes, rows, height)
    kernel = functools.partial(_outer_kernel, bound=visits.bound, scaled=scale is not None)
    piece = min(pieces.LARGE, height)
    scales = () if scale is None else (scale.astype(jnp.float32),)
    call = over_visits(
        kernel,
        visits,
        scalars=len(scales),
        inputs=[tile_block(height, depth), tile_block(height, width)],
        outputs=[matrix_block((experts, depth, width))],
        shapes=[jax.ShapeDtypeStruct((experts, depth, width), jnp.float32)],
        scratch=[
            pltpu.VMEM((piece, depth), lhs.dtype),  # a piece's rows, those of other groups zero
            pltpu.VMEM((piece, width), dout.dtype),
        ],
        cost=(2 * rows * depth * width, lhs.nbytes + dout.nbytes + 4 * experts * depth * width),
        name="grouped_outer",
        interpret=interpret,
    )
    return call(*visits.tables(), *scales, lhs, dout)[0]


def mlp(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    *,
    interpret: Interpret = False,
) -> Float[Array, "rows L"]:
    """Rows through their expert's relu²-MLP: two products, the first one's activation in it."""
    hidden = _product(lhs, up, group_sizes, activation="relu2", interpret=interpret)
    return _product(hidden, down, group_sizes, interpret=interpret)


def _product(lhs: Array, rhs: Array, group_sizes: Array, **options: Any) -> Array:
    """Rows times their expert's matrix, taken as it lies in memory."""
    rhs, turned = lanes.as_it_lies(rhs)
    return matmul(lhs, rhs, group_sizes, transpose_rhs=turned, **options)


def mlp_gradients(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    dout: Float[Array, "rows L"],
    *,
    interpret: Interpret = False,
) -> tuple[Float[Array, "rows L"], Float[Array, "E L F"], Float[Array, "E F L"]]:
    """Gradients of lhs, up and down (these in float32), the hidden computed again."""
    hidden, dbefore = hidden_gradient(lhs, up, down, group_sizes, dout, interpret=interpret)
    dlhs = matmul(dbefore, up, group_sizes, transpose_rhs=True, interpret=interpret)
    dup = outer(lhs, dbefore, group_sizes, interpret=interpret)
    return dlhs, dup, outer(hidden, dout, group_sizes, interpret=interpret)


def hidden_gradient(
    lhs: Float[Array, "rows L"],
    up: Float[Array, "E L F"],
    down: Float[Array, "E F L"],
    group_sizes: Int[Array, "E"],
    dout: Float[Array, "rows L"],
    *,
    interpret: Interpret = False,
) -> tuple[Float[Array, "rows F"], Float[Array, "rows F"]]:
    """relu(lhs up)² and the gradient of lhs up, both in lhs's dtype, for an MLP's backward pass.

    One kernel makes them together from both matrices; neither is kept in float32.
    """
    rows, width, hidden_width = lhs.shape[0], lhs.shape[1], up.shape[2]
    up, down = _like_rows(up, lhs), _like_rows(down, lhs)
    row_bytes = 2 * (width + hidden_width) * lhs.dtype.itemsize
    height = tile_rows(rows, row_bytes, 2 * up[0].size * up.dtype.itemsize)
    visits = by_tile(group_sizes, rows, height)
    kernel = functools.partial(_hidden_kernel, bound=visits.bound)
    call = over_visits(
        kernel,
        visits,
        inputs=[*[tile_block(height, width)] * 2, *map(matrix_block, (up.shape, down.shape))],
        outputs=[tile_block(height, hidden_width)] * 2,
        shapes=[jax.ShapeDtypeStruct((rows, hidden_width), lhs.dtype)] * 2,
        cost=(4 * rows * up[0].size, 2 * lhs.nbytes + up.nbytes + down.nbytes),
        name="grouped_hidden_gradient",
        interpret=interpret,
    )
    return call(*visits.tables(), lhs, dout, up, down)


def _like_rows(matrices: Float[Array, "E K N"], lhs: Array) -> Float[Array, "E K N"]:
    """Matrices no wider than the rows. Training gives its masters' dtype, so that their gradient
    stays in float32; what they were gathered in comes back here without a copy."""
    return matrices.astype(lhs.dtype) if lhs.dtype.itemsize < matrices.dtype.itemsize else matrices


def unsupported(lhs: Array, rhs: Array, *operands: Array | None, **options: Any) -> str | None:
    """Why these operands cannot run, or None: their dtypes, or a matrix too small or too large."""
    if others := {lhs.dtype, rhs.dtype} - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"an operand is {others.pop()}; the kernel takes bfloat16 and float32"
    sides = (lhs.shape[1], rhs.shape[1]) if rhs.ndim == 2 else rhs.shape[1:]
    if min(sides) < NARROWEST:
        return f"an expert's matrix is {sides[0]} x {sides[1]}; sides of {NARROWEST} are the least"
    # The weight gradient keeps an expert's float32 sums, and an MLP's backward pass two matrices.
    blocks = 2 * 4 * sides[0] * sides[1] + TILE_ROWS[-1] * sum(sides) * 12
    if operands and operands[0].ndim == 3:
        itemsize = min(lhs.dtype.itemsize, rhs.dtype.itemsize)
        both = 4 * (sides[0] * sides[1] + TILE_ROWS[-1] * sum(sides)) * itemsize
        blocks = max(blocks, both)
    if blocks > VMEM_BLOCKS:
        return (
            f"an expert's matrix and its rows need {blocks / 2**20:.0f} MiB of fast memory, and "
            f"the kernel keeps it within {VMEM_BLOCKS // 2**20}; shard the matrices"
        )
    return None


def _matmul_kernel(
    expert_ref, tile_ref, low_ref, high_ref, first_ref, *refs,
    bound, transpose_rhs, scaled, activation,
):  # fmt: skip
    """One visit's rows of out, with the expert's matrix as it is fetched."""
    tables = expert_ref, low_ref, high_ref, first_ref, refs[0] if scaled else None
    multiply_visit(
        *(tables, *refs[-3:]), bound=bound, transpose_rhs=transpose_rhs, activation=activation
    )


def multiply_visit(
    tables: tuple[Any, ...],
    lhs_ref: Any,  # [height, K]
    rhs_ref: Any,  # [K, N], or [N, K]
    out_ref: Any,  # [height, N]
    *,
    bound: int,
    transpose_rhs: bool,
    activation: str | None,
) -> None:
    """Writes one visit's rows of out. The tables are those of the visits' experts, first and last
    rows and openings, and the experts' scales or None."""
    expert_ref, low_ref, high_ref, first_ref, scale_ref = tables
    visit = pl.program_id(0) * bound + pl.program_id(1)
    low, high = low_ref[visit], high_ref[visit]
    depth_axis = 1 if transpose_rhs else 0

    @pl.when(first_ref[visit] == 1)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def piece(start, height, _):
        mask = pieces.row_mask(start, height, low, high)

        def columns(column):
            rhs = rhs_ref[column, :] if transpose_rhs else rhs_ref[:, column]
            product = _dot(lhs_ref[pl.ds(start, height), :], rhs, 1, depth_axis)
            if scale_ref is not None:
                product = product * scale_ref[expert_ref[visit]]
            if activation == "relu2":
                product = jnp.square(jnp.maximum(product, 0))
            _put(out_ref, start, height, column, product, mask)

        pieces.over_columns(out_ref.shape[1], columns)

    pieces.over_pieces(low, high, out_ref.shape[0], piece)


def _hidden_kernel(
    expert_ref, tile_ref, low_ref, high_ref, first_ref,
    lhs_ref,  # [height, L]
    dout_ref,  # [height, L]
    up_ref,  # [L, F]
    down_ref,  # [F, L]
    hidden_ref,  # [height, F]: relu(lhs up)²
    dbefore_ref,  # [height, F]: the gradient of lhs up
    *, bound,
):  # fmt: skip
    """The activations of one visit's rows and the gradient before them, F columns in turn."""
    visit = pl.program_id(0) * bound + pl.program_id(1)
    low, high = low_ref[visit], high_ref[visit]

    @pl.when(first_ref[visit] == 1)
    def _():
        hidden_ref[...] = jnp.zeros_like(hidden_ref)
        dbefore_ref[...] = jnp.zeros_like(dbefore_ref)

    def piece(start, height, _):
        mask = pieces.row_mask(start, height, low, high)

        def columns(column):
            rows = pl.ds(start, height)
            positive = jnp.maximum(_dot(lhs_ref[rows, :], up_ref[:, column], 1, 0), 0)
            dhidden = _dot(dout_ref[rows, :], down_ref[column, :], 1, 1)
            _put(hidden_ref, start, height, column, jnp.square(positive), mask)
            _put(dbefore_ref, start, height, column, 2 * positive * dhidden, mask)

        pieces.over_columns(hidden_ref.shape[1], columns)

    pieces.over_pieces(low, high, hidden_ref.shape[0], piece)


def _outer_kernel(
    expert_ref, tile_ref, low_ref, high_ref, first_ref, *refs, bound, scaled
):  # fmt: skip
    """lhs [height, K], dout [height, N], out [K, N] float32: adds one visit's rows to out."""
    lhs_ref, dout_ref, out_ref, left_ref, right_ref = refs[-5:]
    visit = pl.program_id(0) * bound + pl.program_id(1)
    low, high = low_ref[visit], high_ref[visit]

    first = first_ref[visit] == 1

    @pl.when(first & (low >= high))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def piece(start, height, own):
        fresh = first & (own <= low)  # before this the block holds another expert's sums
        # Both sides are masked: a row outside the group may hold infinities, and inf * 0 is NaN.
        mask = pieces.row_mask(start, height, jnp.maximum(low, own), high)
        for source, target in ((lhs_ref, left_ref), (dout_ref, right_ref)):
            value = source[pl.ds(start, height), :].astype(jnp.float32)
            target[:height, :] = jnp.where(mask, value, 0).astype(target.dtype)

        def depths(depth):
            def columns(column):
                left, right = left_ref[:height, depth], right_ref[:height, column]
                product = _dot(left, right, 0, 0)
                if scaled:
                    product = product * refs[0][expert_ref[visit]]
                out_ref[depth, column] = jnp.where(fresh, 0, out_ref[depth, column]) + product

            pieces.over_columns(out_ref.shape[1], columns, pieces.WIDER)

        pieces.over_columns(out_ref.shape[0], depths, pieces.WIDER)

    pieces.over_pieces(low, high, lhs_ref.shape[0], piece, pieces.DEEP)


def _put(ref, start, height: int, column, product: Array, mask: Array) -> None:
    """Replaces the masked rows; the others belong to other groups."""
    rows = pl.ds(start, height)
    old = ref[rows, column].astype(jnp.float32)
    ref[rows, column] = jnp.where(mask, product, old).astype(ref.dtype)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    dtype = jnp.promote_types(left.dtype, right.dtype)
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((left_axis,), (right_axis,)), ((), ())),
        # A float32 product in one bfloat16 pass would not be one.
        precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def tile_rows(rows: int, row_bytes: int, fixed_bytes: int) -> int:
    """The height of a tile whose blocks, two of each, fit beside two of `fixed_bytes`."""
    fits = (h for h in TILE_ROWS if 2 * (h * row_bytes + fixed_bytes) <= VMEM_BLOCKS)
    return min(next(fits, TILE_ROWS[-1]), -(-rows // pieces.STEP) * pieces.STEP)


def tile_block(*shape: int) -> tuple[tuple[int, ...], str]:
    return shape, "tile"


def matrix_block(shape: tuple[int, ...]) -> tuple[tuple[int | None, ...], str]:
    return (None, *shape[1:]), "expert"


def over_visits(
    kernel: Callable[..., None],
    visits: Visits,
    *,
    inputs: list[Any],
    outputs: list[Any],
    shapes: list[jax.ShapeDtypeStruct],
    cost: tuple[int, int],
    name: str,
    interpret: Interpret,
    scalars: int = 0,
    scratch: Any = (),
) -> Callable[..., Any]:
    """A pallas_call over the visits, whose blocks lie where the tables of scalars say."""
    bound = visits.bound

    def spec(block: Any) -> pl.BlockSpec:
        shape, kind = block

        def place(core, i, expert, tile, *_):
            table = tile if kind == "tile" else expert
            return (table[core * bound + i], *(0,) * (len(shape) - 1))

        return pl.BlockSpec(shape, place)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5 + scalars,
            grid=(visits.cores, visits.steps),
            in_specs=[spec(block) for block in inputs],
            out_specs=[spec(block) for block in outputs],
            scratch_shapes=list(scratch),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=cost[0], bytes_accessed=cost[1], transcendentals=0),
        name=name,
        interpret=interpret,
    )
