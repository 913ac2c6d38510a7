"""What each operand of the three products of a weight goes through in a low-precision format."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.precision import MXFP8, NVFP4, NVFP4Config
from nemotron_jax.sharding import is_local, target_platform
from nemotron_jax.sharding.weights import max_over_devices
from pallas_kernels import nvfp4

FPROP, DGRAD, WGRAD = "fprop", "dgrad", "wgrad"
INPUT, WEIGHT, GRADIENT = "input", "weight", "gradient"
# Random streams by product; an operand's is twice that, and one more for a gradient.
_STREAMS = {FPROP: 0, DGRAD: 1, WGRAD: 2}


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How one operand of one product is quantised.

    Blocks run along the product's contraction: along the columns of an operand for (1, n), along
    its rows for (n, 1).
    """

    format: str
    block: tuple[int, int]
    rounding: str = "nearest"
    hadamard: bool = False  # transformed along the rows first


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which of several tensors lying one after another each row of blocks belongs to."""

    of_rows: Int[Array, "R/n"]
    count: int
    shared: bool = True  # whether other devices hold rows of the same tensors
    owners: tuple[str, ...] = ()  # mesh axes along which devices have tensors of their own


@dataclasses.dataclass(frozen=True)
class Draw:
    """Where stochastic rounding takes its random bits from: a stream, and each row's number."""

    words: Array
    rows: Int[Array, "R"]


def treatments(format: str, options: NVFP4Config) -> dict[tuple[str, str], Treatment]:
    """By product and operand, for inputs [tokens, In], weights [In, Out], gradients [tokens, Out].

    Source: TransformerEngine's recipes NVFP4BlockScaling and MXFP8BlockScaling.
    """
    if format == MXFP8:
        along, across = Treatment(MXFP8, (1, 32)), Treatment(MXFP8, (32, 1))
        return {
            (FPROP, INPUT): along,
            (FPROP, WEIGHT): across,
            (DGRAD, GRADIENT): along,
            (DGRAD, WEIGHT): along,
            (WGRAD, INPUT): across,
            (WGRAD, GRADIENT): across,
        }
    square = options.weight_block == "16x16"
    plain = lambda block: Treatment(NVFP4, block)
    activation = lambda block, turned: Treatment(NVFP4, block, options.activation_rounding, turned)
    gradient = lambda block, turned: Treatment(NVFP4, block, options.gradient_rounding, turned)
    return {
        (FPROP, INPUT): activation((1, 16), False),
        (FPROP, WEIGHT): plain((16, 16) if square else (16, 1)),
        (DGRAD, GRADIENT): gradient((1, 16), False),
        (DGRAD, WEIGHT): plain((16, 16) if square else (1, 16)),
        (WGRAD, INPUT): activation((16, 1), options.hadamard),
        (WGRAD, GRADIENT): gradient((16, 1), options.hadamard),
    }


def alignment(format: str) -> int:
    """Rows, and columns, that blocks of a format take at a time."""
    return {NVFP4: 16, MXFP8: 32}.get(format, 1)


def largest(
    parts: Sequence[Float[Array, "R _"]], step: int = 1, *, hadamard: bool = False
) -> Float[Array, ""]:
    """The largest magnitude in any of several matrices, as of one; float32.

    With `hadamard` after the transform of their rows, filled up to multiples of `step`.
    """
    if hadamard:
        fill = [(0, -parts[0].shape[0] % step), (0, 0)]
        parts = [nvfp4.hadamard_rows(jnp.pad(part, fill)) for part in parts]
    each = [jnp.max(jnp.abs(part)).astype(jnp.float32) for part in parts]
    return functools.reduce(jnp.maximum, each)


def largest_of_groups(
    x: Float[Array, "R C"], treatment: Treatment, groups: Groups
) -> Float[Array, "groups"]:
    """The largest magnitude of each group on this device, after the transform that the treatment
    begins with; float32, 0 for an empty group and where the format scales by none."""
    if treatment.format == MXFP8:
        return jnp.zeros(groups.count, jnp.float32)
    turned = nvfp4.hadamard_rows(x) if treatment.hadamard else x
    rows = jnp.max(jnp.abs(turned).reshape(groups.of_rows.shape[0], -1), axis=1)
    found = jax.ops.segment_max(
        rows.astype(jnp.float32), groups.of_rows, groups.count, indices_are_sorted=True
    )
    return jnp.maximum(found, 0)  # an empty group's maximum is -inf


def quantized(
    x: Float[Array, "R C"],
    treatment: Treatment,
    *,
    draw: Draw | None = None,
    groups: Groups | None = None,
    amax: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "R C"], Float[Array, "..."]]:
    """The operand, exact in bfloat16, and the factor that belongs to the product: a number, or one
    for each group.

    Sizes are multiples of `alignment`. Without `draw` it is rounded to the nearest. `amax` is the
    largest magnitude to scale by: that of `x`, or of each group, unless given. It is all devices'
    together, inside `local` too, but for groups that are not `shared`.
    """
    if treatment.format == MXFP8:
        ones = jnp.ones(() if groups is None else groups.count, jnp.float32)
        return nvfp4.round_trip_mxfp8(x, block=treatment.block), ones
    if amax is None and groups is None:
        amax = max_over_devices(largest([x], hadamard=treatment.hadamard))
    elif amax is None:
        amax = largest_of_groups(x, treatment, groups)
        amax = max_over_devices(amax, owners=groups.owners) if groups.shared else amax
    of_strips = amax if groups is None else amax[groups.of_rows][:, None]  # of 16 rows each
    draws = {} if draw is None else {"words": draw.words, "rows": draw.rows}
    operand = nvfp4.round_trip(
        x,
        block=treatment.block,
        rounding="nearest" if draw is None else treatment.rounding,
        amax=of_strips,
        hadamard=treatment.hadamard,
        implementation=None if is_local() else "xla",
        target=target_platform(),
        **draws,
    )
    return operand, amax / nvfp4.REACH


def stream(words: Array, product: str, side: str) -> Array:
    """The random words of one operand, of those of a matmul in a layer and step."""
    return nvfp4.fold(words, 2 * _STREAMS[product] + (side == GRADIENT))
