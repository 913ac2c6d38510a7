"""Products in an emulated low-precision format: operands quantised, sums in float32.

Gradients pass the quantisers unchanged: a product's backward pass is two more products, of operands
quantised anew from the high-precision values as the recipe says.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.precision import NVFP4Config
from nemotron_jax.quant import operands
from nemotron_jax.quant.operands import (
    DGRAD,
    FPROP,
    GRADIENT,
    INPUT,
    WEIGHT,
    WGRAD,
    Draw,
    Groups,
    alignment,
    stream,
    treatments,
)
from nemotron_jax.sharding import (
    Cuts,
    gather_parameter,
    gathered,
    scattered,
    shard_parameter,
    whole,
)
from nemotron_jax.types import Axes
from pallas_kernels import grouped_matmul, grouped_outer, nvfp4


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a product does, but for its arrays; a static argument."""

    role: str
    format: str
    options: NVFP4Config
    out_dtypes: tuple[jnp.dtype, ...]  # one for each weight
    axes: tuple[Axes, ...] = ()  # the weights' logical axes; () where they are whole
    cuts: Cuts = Cuts()  # of experts inside `local`: how devices share them
    implementation: str | None = None  # of kernels, as the two things their ops choose by
    target: str | None = None

    @property
    def kernel(self) -> dict[str, str | None]:
        return {"implementation": self.implementation, "target": self.target}

    @property
    def step(self) -> int:
        """Rows and columns that the format's blocks take at a time."""
        return alignment(self.format)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot(
    spec: Spec,
    x: Float[Array, "rows In"],
    weights: tuple[Float[Array, "In _"], ...],
    words: Array | None,
    rows: Int[Array, "rows"],
) -> tuple[Float[Array, "rows _"], ...]:
    """`x` times each of the weights, which share one largest magnitude as one matrix would.

    `words` and `rows` place the random bits; `words` may be None where nothing is drawn.
    """
    draw = _draw(spec, words, rows, FPROP, INPUT)
    left, scale = _operand(spec, x, FPROP, INPUT, draw)
    results = []
    amax = operands.largest(weights)
    for number, weight in enumerate(weights):
        right, weight_scale = _weight_operand(spec, number, weight, FPROP, amax)
        y = _contract(left, right, (1, 0), x.dtype) * (scale * weight_scale)
        results.append(y[: x.shape[0], : weight.shape[1]].astype(spec.out_dtypes[number]))
    return tuple(results)


def _dot_forward(spec, x, weights, words, rows):
    return dot(spec, x, weights, words, rows), (x, weights, words, rows)


def _dot_backward(spec, residuals, gradients):
    x, weights, words, rows = residuals
    left, scale = _operand(spec, x, WGRAD, INPUT, _draw(spec, words, rows, WGRAD, INPUT))
    amax = operands.largest(weights)
    dx, dweights = jnp.zeros((), jnp.float32), []
    hadamard = treatments(spec.format, spec.options)[WGRAD, GRADIENT].hadamard
    largest = {
        product: operands.largest(gradients, spec.step, hadamard=hadamard and product == WGRAD)
        for product in (DGRAD, WGRAD)
    }
    for number, (weight, dy) in enumerate(zip(weights, gradients, strict=True)):
        draw = _draw(spec, words, rows, DGRAD, GRADIENT, number)
        dy_rows, dy_scale = _operand(spec, dy, DGRAD, GRADIENT, draw, amax=largest[DGRAD])
        turned, weight_scale = _weight_operand(spec, number, weight, DGRAD, amax)
        dx += _contract(dy_rows, turned, (1, 1), x.dtype) * (dy_scale * weight_scale)
        draw = _draw(spec, words, rows, WGRAD, GRADIENT, number)
        right, gradient_scale = _operand(spec, dy, WGRAD, GRADIENT, draw, amax=largest[WGRAD])
        dweight = _contract(left, right, (0, 0), x.dtype) * (scale * gradient_scale)
        dweight = dweight[: weight.shape[0], : weight.shape[1]]
        if spec.axes:
            dweight = shard_parameter(dweight, spec.axes[number])
        dweights.append(dweight.astype(weight.dtype))
    return dx[: x.shape[0], : x.shape[1]].astype(x.dtype), tuple(dweights), None, None


dot.defvjp(_dot_forward, _dot_backward)


def grouped_dot(
    spec: Spec,
    x: Float[Array, "rows In"],
    weight: Float[Array, "_ In _"],
    group_sizes: Int[Array, "E"],
    words: Array | None,
    rows: Int[Array, "rows"],
) -> Float[Array, "rows _"]:
    """Each row times its expert's matrix; every expert's rows and matrix are tensors of their own.

    Groups start at multiples of the blocks' rows and are filled up with rows of zeros, as
    `sort_by_expert` with `align` makes them. `weight` may be this device's part, cut as
    `spec.cuts` say: whole experts are quantised where they lie, and then gathered.
    """
    if any(axis > 0 for axis, _ in spec.cuts.gathered):
        weight = gathered(weight, spec.cuts, x.dtype)
        spec = dataclasses.replace(spec, cuts=dataclasses.replace(spec.cuts, gathered=()))
    padding = [(0, -size % spec.step) for size in weight.shape[1:]]
    y = _grouped_dot(
        spec,
        jnp.pad(x, ((0, 0), padding[0])),
        jnp.pad(weight, ((0, 0), *padding)),
        group_sizes,
        words,
        rows,
    )
    return y[:, : weight.shape[2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(spec, x, weight, group_sizes, words, rows) -> Array:
    groups = _row_groups(spec, x, group_sizes)
    draw = _draw(spec, words, rows, FPROP, INPUT)
    left, scale = _operand(spec, x, FPROP, INPUT, draw, groups)
    right, weight_scale = _expert_operand(spec, weight, FPROP)
    y = grouped_matmul(
        *(left.astype(x.dtype), right.astype(x.dtype), group_sizes),
        scale=scale * weight_scale,
        **spec.kernel,
    )
    return y.astype(spec.out_dtypes[0])


def _grouped_forward(spec, *arrays):
    return _grouped_dot(spec, *arrays), arrays


def _grouped_backward(spec, residuals, dy):
    x, weight, group_sizes, words, rows = residuals
    groups, dtype = _row_groups(spec, x, group_sizes), x.dtype
    draw = _draw(spec, words, rows, DGRAD, GRADIENT)
    left, scale = _operand(spec, dy, DGRAD, GRADIENT, draw, groups)
    right, weight_scale = _expert_operand(spec, weight, DGRAD)
    dx = grouped_matmul(
        *(left.astype(dtype), right.astype(dtype), group_sizes),
        transpose_rhs=True,
        scale=scale * weight_scale,
        **spec.kernel,
    )
    draw = _draw(spec, words, rows, WGRAD, INPUT)
    left, scale = _operand(spec, x, WGRAD, INPUT, draw, groups)
    draw = _draw(spec, words, rows, WGRAD, GRADIENT)
    right, gradient_scale = _operand(spec, dy, WGRAD, GRADIENT, draw, groups)
    left, right = left.astype(dtype), right.astype(dtype)
    dweight = grouped_outer(left, right, group_sizes, scale=scale * gradient_scale, **spec.kernel)
    dweight = scattered(dweight, spec.cuts).astype(weight.dtype)
    return dx.astype(dtype), dweight, None, None, None


_grouped_dot.defvjp(_grouped_forward, _grouped_backward)


def _operand(
    spec: Spec,
    x: Float[Array, "R C"],
    product: str,
    side: str,
    draw: Draw | None = None,
    groups: Groups | None = None,
    *,
    amax: Array | None = None,
) -> tuple[Array, Array]:
    treatment = treatments(spec.format, spec.options)[product, side]
    padding = [(0, -size % spec.step) for size in x.shape]
    x = jnp.pad(x, padding) if any(after for _, after in padding) else x
    return operands.quantized(x, treatment, draw=draw, groups=groups, amax=amax)


def _weight_operand(
    spec: Spec, number: int, weight: Array, product: str, amax: Array
) -> tuple[Array, Array]:
    """A weight quantised where its parts lie, then gathered: bfloat16 holds it exactly."""
    operand, scale = _operand(spec, weight, product, WEIGHT, amax=amax)
    if spec.axes and operand.shape == weight.shape:
        operand = gather_parameter(operand.astype(jnp.bfloat16), spec.axes[number])
    return operand, scale


def _expert_operand(
    spec: Spec, weight: Float[Array, "_ In Out"], product: str
) -> tuple[Float[Array, "E In Out"], Float[Array, "E"]]:
    """All experts' matrices, quantised where they lie and then gathered: bfloat16 holds them
    exactly."""
    count, rows, columns = weight.shape
    blocks = rows // spec.step
    groups = Groups(jnp.repeat(jnp.arange(count), blocks), count, shared=False)
    flat = weight.reshape(count * rows, columns)
    operand, scale = _operand(spec, flat, product, WEIGHT, groups=groups)
    operand = operand.reshape(weight.shape)
    if not spec.cuts.gathered:
        return operand, scale
    return whole(operand, spec.cuts, jnp.bfloat16), whole(scale, spec.cuts, scale.dtype)


def _row_groups(spec: Spec, x: Float[Array, "rows _"], group_sizes: Int[Array, "E"]) -> Groups:
    starts = spec.step * jnp.arange(x.shape[0] // spec.step, dtype=jnp.int32)
    of_rows = jnp.searchsorted(jnp.cumsum(group_sizes), starts, side="right")
    last = group_sizes.shape[0] - 1  # rows past all groups are zeros and belong to any
    of_rows = jnp.minimum(of_rows, last).astype(jnp.int32)
    return Groups(of_rows, group_sizes.shape[0], owners=spec.cuts.owners)


def _draw(
    spec: Spec, words: Array | None, rows: Array, product: str, side: str, number: int = 0
) -> Draw | None:
    """The random bits of an operand that is rounded stochastically; None for another.

    `number` tells the weights of one product apart.
    """
    if treatments(spec.format, spec.options)[product, side].rounding != "stochastic":
        return None
    if words is None:
        raise ValueError(
            f"{spec.role} in {spec.format}: the {side} of its {product} product is rounded "
            "stochastically; pass key= to the model, another one at every step"
        )
    words = stream(words, product, side)
    filling = ~jnp.arange(-rows.shape[0] % spec.step)  # numbers that no row has
    return Draw(nvfp4.fold(words, number) if number else words, jnp.concatenate([rows, filling]))


def _contract(left: Array, right: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    left, right = left.astype(dtype), right.astype(dtype)
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)
