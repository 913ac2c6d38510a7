"""Grouped products with experts in NVFP4's codes: for decoding, where their bytes bound the time.

The codes lie as a kernel takes them apart, eight of one column in a 32-bit word and all words of a
block of 16 in rows of their own, so that a vector of words meets one vector of scales and nothing
is spread or turned over.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import dispatch, nvfp4
from pallas_kernels.grouped_matmul import packed_tpu, reference, xla
from pallas_kernels.grouped_matmul.lanes import LANES
from pallas_kernels.grouped_matmul.packed_tpu import BLOCK, DEPTH
from pallas_kernels.nvfp4.xla import values

WORD = 8  # codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Matrices [E, K, N] in NVFP4: B blocks of 16 along K, filled up to a multiple of 8, and C
    columns, N as `filled_columns` fills them up.

    Word (h, b, n) of an expert holds the codes of rows 16 b + 8 h + j of column n, j = 0 in the
    lowest four bits. Words are bits, and no number: float32 is what they are kept in, for with an
    integer among its parameters `jax.grad` refuses a model before anyone can say which and why.
    """

    words: Float[Array, "E 2 B C"]  # float32
    scales: Float[Array, "E B C"]  # float8_e4m3fn, one for each block
    factor: Float[Array, "E"]  # float32, one for each expert
    depth: int = dataclasses.field(metadata={"static": True})  # K
    width: int = dataclasses.field(metadata={"static": True})  # N

    def codes(self) -> UInt8[Array, "E K N"]:
        """What `pack_experts` put together."""
        return jax.vmap(lambda words: unpacked(words)[: self.depth, : self.width])(self.words)

    def matrices(self, dtype: jnp.dtype) -> Float[Array, "E K N"]:
        """The floats that they stand for, one expert's after the other, each rounded once.

        An element is its code's number times the float32 product of scale and factor, in the order
        of the tools that write checkpoints.
        """
        return _matrices(self, jnp.dtype(dtype))


def filled_columns(width: int) -> int:
    """Columns that words of matrices of so many have: whole lanes, where that adds little.

    XLA keeps a parameter of a TPU with an axis of whole lanes last, where there is one, and every
    program would turn the words round for the kernel. Lanes that are not filled are lost in any
    case; what other devices would lose too is a sixteenth at the most.
    """
    filling = -width % LANES
    return width + filling if 16 * filling <= width else width


def pack_experts(
    codes: UInt8[Array, "E K N"], scales: Float[Array, "E K/16 N"], factor: Float[Array, "E"]
) -> PackedExperts:
    """Codes 0..15 and float8_e4m3fn scales in the order in which the products take them.

    An element is its code's number times its block's scale and its expert's factor: 1 / 2688 of an
    expert's largest magnitude, or a checkpoint's second scale. Raises ValueError for shapes that
    disagree, and where K is not a multiple of 16.
    """
    depth = codes.shape[1]
    if depth % BLOCK:
        raise ValueError(f"pack_experts: K={depth} is not a multiple of {BLOCK}, a block's rows")
    sizes = {"K/16": depth // BLOCK}
    shapes = {"codes": (codes, "E K N"), "scales": (scales, "E K/16 N"), "factor": (factor, "E")}
    dispatch.expect_shape("pack_experts", sizes, **shapes)
    width, filling = codes.shape[2], -depth % DEPTH
    columns = (0, filled_columns(width) - width)
    codes = jnp.pad(codes, [(0, 0), (0, filling), columns])
    scales = jnp.pad(scales, [(0, 0), (0, filling // BLOCK), columns])
    blocks = codes.reshape(codes.shape[0], -1, 2, WORD, codes.shape[2])
    shifted = (blocks[:, :, :, j].astype(jnp.uint32) << (4 * j) for j in range(WORD))
    words = jax.lax.bitcast_convert_type(sum(shifted), jnp.float32)
    words, factor = jnp.swapaxes(words, 1, 2), factor.astype(jnp.float32)
    return PackedExperts(words, scales, factor, depth, width)


def quantize_experts(
    matrices: Float[Array, "E K N"], *, implementation: str | None = None
) -> PackedExperts:
    """Matrices rounded to the nearest NVFP4 numbers, each with its own largest magnitude.

    Raises ValueError as `nvfp4.quantize` and `pack_experts` do.
    """

    def one(matrix: Float[Array, "K N"]) -> tuple[Array, Array, Array]:
        q = nvfp4.quantize(matrix.T, block=(1, BLOCK), implementation=implementation)
        return nvfp4.unpack(q.codes, implementation="xla").T, q.scales.T, q.factor

    return pack_experts(*jax.lax.map(one, matrices))


@functools.partial(jax.jit, static_argnums=1)
def _matrices(packed: PackedExperts, dtype: jnp.dtype) -> Float[Array, "E K N"]:
    def one(expert: tuple[Array, Array, Array]) -> Float[Array, "K N"]:
        words, scales, factor = expert
        steps = jnp.repeat(scales.astype(jnp.float32) * factor, BLOCK, axis=0)
        return (values(unpacked(words)) * steps)[: packed.depth, : packed.width].astype(dtype)

    return jax.lax.map(one, (packed.words, packed.scales, packed.factor))


def unpacked(words: Float[Array, "2 B N"]) -> UInt8[Array, "16*B N"]:
    """The codes of one expert's words, filling included."""
    shifts = 4 * jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    codes = ((words[:, :, None] >> shifts) & 15).astype(jnp.uint8)
    return jnp.swapaxes(codes, 0, 1).reshape(-1, words.shape[2])


def _reference(lhs, words, scales, factor, group_sizes, *, activation):
    codes = jax.vmap(unpacked)(words)[:, : lhs.shape[1]]
    matrices = reference.dequantized(codes, scales[:, : lhs.shape[1] // BLOCK])
    wide = reference.grouped_matmul(lhs.astype(jnp.float32), matrices, group_sizes, factor)
    return _activated(wide, activation).astype(lhs.dtype)


def _xla(lhs, words, scales, factor, group_sizes, *, activation):
    matrix = lambda expert: _matrix(words, scales, expert, lhs.shape[1], lhs.dtype)
    shape = lhs.shape[1], words.shape[3]
    return xla.matmul_of(lhs, matrix, shape, group_sizes, factor, activation)


def _reference_transposed(lhs, words, scales, factor, group_sizes, *, depth):
    codes = jax.vmap(unpacked)(words)[:, :depth]
    matrices = reference.dequantized(codes, scales[:, : depth // BLOCK])
    wide = reference.grouped_matmul(
        lhs.astype(jnp.float32), jnp.swapaxes(matrices, 1, 2), group_sizes, factor
    )
    return wide.astype(lhs.dtype)


def _xla_transposed(lhs, words, scales, factor, group_sizes, *, depth):
    matrix = lambda expert: _matrix(words, scales, expert, depth, lhs.dtype).T
    return xla.matmul_of(lhs, matrix, (words.shape[3], depth), group_sizes, factor, None)


def _matrix(
    words: Array, scales: Array, expert: Array, depth: int, dtype: jnp.dtype
) -> Float[Array, "K N"]:
    """One expert's matrix but for its factor: exact in bfloat16."""
    scale = jnp.repeat(scales[expert].astype(jnp.float32), BLOCK, axis=0)[:depth]
    return (values(unpacked(words[expert])[:depth]) * scale).astype(dtype)


def _activated(product: Array, activation: str | None) -> Array:
    return jnp.square(jax.nn.relu(product)) if activation == "relu2" else product


# Operands: (lhs, words, scales, factor, group_sizes).
PACKED = dispatch.Op(
    "grouped_matmul_packed",
    {
        "reference": dispatch.Implementation(dispatch.keeping_operands(_reference)),
        "xla": dispatch.Implementation(dispatch.keeping_operands(_xla)),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(packed_tpu.matmul),
            unsupported=packed_tpu.unsupported,
            platforms=("tpu",),
        ),
    },
)


TRANSPOSED = dispatch.Op(
    "grouped_matmul_packed_transposed",
    {
        "reference": dispatch.Implementation(dispatch.keeping_operands(_reference_transposed)),
        "xla": dispatch.Implementation(dispatch.keeping_operands(_xla_transposed)),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(packed_tpu.matmul_transposed),
            unsupported=packed_tpu.unsupported,
            platforms=("tpu",),
        ),
    },
)


def grouped_matmul_packed(
    lhs: Float[Array, "rows K"],
    packed: PackedExperts,
    group_sizes: Int[Array, "E"],
    *,
    activation: str | None = None,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "rows N"]:
    """`grouped_matmul` by the matrices that packed experts stand for, in lhs's dtype.

    An element without its expert's factor is exact in bfloat16; the factor multiplies the products
    in float32. `activation` "relu2" squares what is positive of them, before the only rounding.
    Raises ValueError for shapes that disagree, for an activation that does not exist and for an
    implementation that cannot run. It has no derivative.
    """
    op = "grouped_matmul_packed"
    sizes: dict[str, int] = {"K": packed.depth}
    shapes = {"words": (packed.words, "E 2 B C"), "scales": (packed.scales, "E B C")}
    lines = {"factor": (packed.factor, "E"), "group_sizes": (group_sizes, "E")}
    dispatch.expect_shape(op, sizes, lhs=(lhs, "rows K"), **shapes, **lines)
    if activation not in (None, "relu2"):
        raise ValueError(f"{op}: activation={activation!r} is neither None nor 'relu2'")
    operands = packed.words, packed.scales, packed.factor, group_sizes
    out = PACKED(
        *(lhs, *operands), activation=activation, implementation=implementation, target=target
    )
    return out[:, : packed.width]


def grouped_matmul_packed_transposed(
    lhs: Float[Array, "rows N"],
    packed: PackedExperts,
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "rows K"]:
    """The rows times the transpose of their expert's matrix: what `grouped_matmul_packed` hands
    back to its rows.

    Raises ValueError for shapes that disagree and for an implementation that cannot run.
    """
    op = "grouped_matmul_packed_transposed"
    shapes = {"words": (packed.words, "E 2 B C"), "scales": (packed.scales, "E B C")}
    lines = {"factor": (packed.factor, "E"), "group_sizes": (group_sizes, "E")}
    dispatch.expect_shape(op, {"N": packed.width}, lhs=(lhs, "rows N"), **shapes, **lines)
    lhs = jnp.pad(lhs, [(0, 0), (0, packed.words.shape[3] - packed.width)])
    operands = packed.words, packed.scales, packed.factor, group_sizes
    return TRANSPOSED(
        *(lhs, *operands), depth=packed.depth, implementation=implementation, target=target
    )
