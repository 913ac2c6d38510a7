"""NVFP4 quantisation: contract, checks, padding, random numbers.

An element is one of 16 codes (E2M1); a block of 16 shares a float8 scale (E4M3), and the tensor one
float32 scale, its largest magnitude / REACH. Nothing here has a derivative: what trains through a
quantiser passes gradients on unchanged and says so where it does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels.nvfp4 import pallas_tpu, random, reference, tpu_codes, xla

REACH = xla.REACH  # a matrix whose largest magnitude is this has the factor 1
BLOCKS = ((1, 16), (16, 1), (16, 16))
MXFP8_BLOCKS = ((1, 32), (32, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix in NVFP4: two codes a byte, the even column's in the low four bits."""

    codes: UInt8[Array, "R C/2"]
    scales: Array  # float8_e4m3fn [R/r, C/c], one for each block of (r, c)
    amax: Float[Array, ""]
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})  # without its padding

    @property
    def factor(self) -> Float[Array, ""]:
        """The float32 scale of the whole matrix: an element is code times block scale times it."""
        return self.amax / REACH


def _drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A form that takes random numbers, as one that takes what they are drawn from."""

    def forward(x, words, rows, amax, **options):
        numbers = None if words is None else random.uniform(words, rows, x.shape[1])
        return function(x, options.pop("block"), numbers, amax, **options)

    return dispatch.keeping_operands(forward)


def _packing(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def packed(*arguments: Any) -> tuple[Array, Array]:
        codes, scales, *_ = quantize(*arguments)
        return _pack(codes), scales

    return packed


def _pack(codes: UInt8[Array, "... C"]) -> UInt8[Array, "... C/2"]:
    # On a CPU every second byte is fetched by itself, in four times the time of the rounding before
    # it; a sum of neighbours is not.
    return jax.lax.platform_dependent(codes, cpu=_summed_pairs, default=_joined_pairs)


def _summed_pairs(codes: Array) -> Array:
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return jnp.sum(pairs * jnp.array([1, 16], jnp.uint8), axis=-1, dtype=jnp.uint8)


def _joined_pairs(codes: Array) -> Array:
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _unpack(packed: UInt8[Array, "... C/2"]) -> UInt8[Array, "... C"]:
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def _reference_round_trip(x, block, numbers, amax, *, hadamard):
    x = reference.hadamard(x).T if hadamard else x
    amax = jnp.repeat(amax, 16, axis=0) if amax.ndim and block[0] == 1 else amax
    codes, scales, _ = reference.quantize(x, block, numbers, amax)
    return reference.dequantize(codes, scales, REACH, block)


# Operands: (x, words, rows, amax); without words rounding is to the nearest.
QUANTIZE = dispatch.Op(
    "quantize",
    {
        "reference": dispatch.Implementation(_drawn(_packing(reference.quantize))),
        "xla": dispatch.Implementation(_drawn(_packing(xla.quantize))),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(tpu_codes.quantize),
            unsupported=tpu_codes.unsupported,
            platforms=("tpu",),
        ),
    },
)
ROUND_TRIP = dispatch.Op(
    "round_trip",
    {
        "reference": dispatch.Implementation(_drawn(_reference_round_trip)),
        "xla": dispatch.Implementation(_drawn(xla.round_trip)),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(pallas_tpu.round_trip),
            unsupported=pallas_tpu.unsupported,
            platforms=("tpu",),
        ),
    },
)
PACK = dispatch.Op(
    "pack",
    {
        "xla": dispatch.Implementation(dispatch.keeping_operands(_pack)),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(tpu_codes.pack),
            unsupported=tpu_codes.unsupported_packing,
            platforms=("tpu",),
        ),
    },
)
UNPACK = dispatch.Op(
    "unpack",
    {
        "xla": dispatch.Implementation(dispatch.keeping_operands(_unpack)),
        "pallas_tpu": dispatch.Implementation(
            dispatch.keeping_operands(tpu_codes.unpack),
            unsupported=tpu_codes.unsupported_unpacking,
            platforms=("tpu",),
        ),
    },
)
HADAMARD = dispatch.Op(
    "hadamard",
    {
        "reference": dispatch.Implementation(dispatch.keeping_operands(reference.hadamard)),
        "xla": dispatch.Implementation(dispatch.keeping_operands(xla.hadamard)),
    },
)
MXFP8 = dispatch.Op(
    "quantize_mxfp8",
    {
        "reference": dispatch.Implementation(dispatch.keeping_operands(reference.quantize_mxfp8)),
        "xla": dispatch.Implementation(dispatch.keeping_operands(xla.quantize_mxfp8)),
    },
)


def quantize(
    x: Float[Array, "R C"],
    *,
    block: tuple[int, int] = (1, 16),
    rounding: str = "nearest",
    key: Array | None = None,
    pad: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """x as codes and scales, with TransformerEngine's arithmetic, bit for bit.

    `rounding` is nearest (ties to even) or stochastic: it rounds up with probability equal to the
    fractional distance from the lower code, by 24 random bits of `key` (jax.random.key, or two
    words uint32 [2]). A NaN makes its block and the tensor's amax NaN; an infinity saturates.
    `pad` fills the last blocks up with zeros. Raises ValueError for another block or rounding, a
    missing key, sizes that are not a multiple of the block, and an implementation that cannot run.
    """
    _check_options("quantize", x, block, BLOCKS, rounding, key)
    shape = x.shape
    if pad:
        x = jnp.pad(x, [(0, -size % step) for size, step in zip(x.shape, (block[0], 16))])
    _check_sizes("quantize", x, block)
    if x.shape[1] % 2:
        raise ValueError(f"quantize: C={x.shape[1]} is odd, and two columns make a byte; pad it")
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32)
    drawn = _random(x, rounding, key, None)
    codes, scales = QUANTIZE(x, *drawn, amax, block=block, implementation=implementation)
    return Quantized(codes, scales, amax, block, shape)


def dequantize(q: Quantized) -> Float[Array, "R C"]:
    """The float32 matrix that codes and scales stand for."""
    scale = xla.spread(q.scales.astype(jnp.float32), q.block)
    value = xla.values(unpack(q.codes)) * scale * q.factor
    return value[: q.shape[0], : q.shape[1]]


def round_trip(
    x: Float[Array, "R C"],
    *,
    block: tuple[int, int],
    rounding: str = "nearest",
    words: Array | None = None,
    rows: Int[Array, "R"] | None = None,
    amax: Array | None = None,
    hadamard: bool = False,
    implementation: str | None = None,
    target: str | None = None,
) -> Float[Array, "R C"]:
    """`dequantize(quantize(x)) / (amax / REACH)` in float32, without making the codes.

    Every element is an E2M1 number times its block's scale, exact in bfloat16, so a product of two
    such matrices in bfloat16 with float32 sums is NVFP4's own; the two factors amax / REACH belong
    to the result. `amax` is the tensor's (x's own by default), or one for each 16 rows [R/16, 1]
    where several tensors lie one after another. `rows` are the numbers by which rows draw their
    random bits, 0, 1, … by default. With `hadamard` it is `hadamard_rows(x)` that is quantised, and
    amax is that matrix's. `target` is the platform that the program is compiled for, if known.
    Raises ValueError as `quantize` does.
    """
    _check_options("round_trip", x, block, BLOCKS, rounding, words)
    _check_sizes("round_trip", x, block)
    if hadamard and block != (16, 1):
        raise ValueError(
            f"round_trip: block={block}; the Hadamard transform mixes the rows of blocks (16, 1)"
        )
    if amax is None:
        amax = jnp.max(jnp.abs(xla.hadamard_rows(x) if hadamard else x)).astype(jnp.float32)
    elif amax.ndim:
        strips = {"R/16": x.shape[0] // 16, "1": 1}
        dispatch.expect_shape("round_trip", strips, amax=(amax, "R/16 1"))
    return ROUND_TRIP(
        *(x, *_random(x, rounding, words, rows), amax),
        block=block,
        hadamard=hadamard,
        implementation=implementation,
        target=target,
    )


def hadamard(x: Float[Array, "R C"], *, implementation: str | None = None) -> Array:
    """bfloat16 [C, R]: xᵀ with each 16 consecutive elements of a row transformed.

    The transform is orthogonal, a fixed sign for each of the 16 and then Sylvester's matrix / 4; x
    is rounded to bfloat16 before and the result after it. It cancels where both operands of a
    product over R have it. Raises ValueError if R is not a multiple of 16.
    """
    dispatch.expect_shape("hadamard", {}, x=(x, "R C"))
    _check_sizes("hadamard", x, (16, 1))
    return HADAMARD(x, implementation=implementation)


def hadamard_rows(x: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """`hadamard(x).T` without transposing: rows are mixed in blocks of 16."""
    _check_sizes("hadamard_rows", x, (16, 1))
    return xla.hadamard_rows(x)


def quantize_mxfp8(
    x: Float[Array, "R C"], *, implementation: str | None = None
) -> tuple[Array, UInt8[Array, "R C/32"]]:
    """float8_e4m3fn values and the biased exponents (E8M0) of blocks of 32 along C.

    The exponent is rounded up, so nothing saturates. Raises ValueError if C is not a multiple of
    32.
    """
    dispatch.expect_shape("quantize_mxfp8", {}, x=(x, "R C"))
    _check_sizes("quantize_mxfp8", x, (1, 32))
    return MXFP8(x, implementation=implementation)


def round_trip_mxfp8(x: Float[Array, "R C"], *, block: tuple[int, int]) -> Float[Array, "R C"]:
    """What MXFP8 in blocks of (1, 32) or (32, 1) leaves of x, exact in bfloat16; float32."""
    _check_options("round_trip_mxfp8", x, block, MXFP8_BLOCKS, "nearest", None)
    _check_sizes("round_trip_mxfp8", x, block)
    return xla.round_trip_mxfp8(x, block)


def pack(
    codes: UInt8[Array, "... C"], *, implementation: str | None = None, target: str | None = None
) -> UInt8[Array, "... C/2"]:
    """Two codes a byte, the even column's in the low four bits."""
    return PACK(codes, implementation=implementation, target=target)


def unpack(
    packed: UInt8[Array, "... C/2"], *, implementation: str | None = None, target: str | None = None
) -> UInt8[Array, "... C"]:
    """The codes that `pack` put together."""
    return UNPACK(packed, implementation=implementation, target=target)


def _random(
    x: Array, rounding: str, key: Array | None, rows: Array | None
) -> tuple[Array | None, Array | None]:
    """Words and numbers of the rows to draw random bits by; None where nothing is drawn."""
    if rounding != "stochastic":
        return None, None
    return random.key_words(key), jnp.arange(x.shape[0]) if rows is None else rows


def _check_options(
    op: str, x: Array, block: tuple[int, int], blocks: Any, rounding: str, key: Array | None
) -> None:
    dispatch.expect_shape(op, {}, x=(x, "R C"))
    if block not in blocks:
        raise ValueError(f"{op}: block={block} is not one of {', '.join(map(str, blocks))}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{op}: rounding={rounding!r} is neither 'nearest' nor 'stochastic'")
    if rounding == "stochastic" and key is None:
        raise ValueError(f"{op}: rounding='stochastic' draws random bits; pass a key")


def _check_sizes(op: str, x: Array, block: tuple[int, int]) -> None:
    for letter, size, step in zip("RC", x.shape, block, strict=True):
        if size % step or not size:
            raise ValueError(
                f"{op}: {letter}={size} is not a multiple of the block's {step}; pad x with zeros"
                + (", or pass pad=True" if op == "quantize" else "")
            )
