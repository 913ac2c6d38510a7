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
from nemotron_jax.quant.codes import Codes
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
from nemotron_jax.sharding import shard_parameter
from nemotron_jax.sharding.weights import Cuts, gather_parameter, gathered, scattered, whole
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
        """The choice of a kernel, as ops of pallas_kernels take it."""
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
    codes: tuple[Codes | None, ...],
) -> tuple[Float[Array, "rows _"], ...]:
    """`x` times each of the weights, which share one largest magnitude as one matrix would.

    `words` and `rows` place the random bits; `words` may be None where nothing is drawn. `codes`
    are the weights', where they were made beforehand.
    """
    draw = _draw(spec, words, rows, FPROP, INPUT)
    left, scale = _operand(spec, x, FPROP, INPUT, draw)
    results = []
    quantised = _weight_operands(spec, weights, FPROP, codes)
    for number, weight in enumerate(weights):
        right, weight_scale = quantised[number]
        y = _contract(left, right, (1, 0), x.dtype) * (scale * weight_scale)
        results.append(y[: x.shape[0], : weight.shape[1]].astype(spec.out_dtypes[number]))
    return tuple(results)


def _dot_forward(spec, x, weights, words, rows, codes):
    return dot(spec, x, weights, words, rows, codes), (x, weights, words, rows, codes)


def _dot_backward(spec, residuals, gradients):
    x, weights, words, rows, codes = residuals
    left, scale = _operand(spec, x, WGRAD, INPUT, _draw(spec, words, rows, WGRAD, INPUT))
    quantised = _weight_operands(spec, weights, DGRAD, codes)
    dx, dweights = jnp.zeros((), jnp.float32), []
    hadamard = treatments(spec.format, spec.options)[WGRAD, GRADIENT].hadamard
    largest = {
        product: operands.largest(gradients, spec.step, hadamard=hadamard and product == WGRAD)
        for product in (DGRAD, WGRAD)
    }
    for number, (weight, dy) in enumerate(zip(weights, gradients, strict=True)):
        draw = _draw(spec, words, rows, DGRAD, GRADIENT, number)
        dy_rows, dy_scale = _operand(spec, dy, DGRAD, GRADIENT, draw, amax=largest[DGRAD])
        turned, weight_scale = quantised[number]
        dx += _contract(dy_rows, turned, (1, 1), x.dtype) * (dy_scale * weight_scale)
        draw = _draw(spec, words, rows, WGRAD, GRADIENT, number)
        right, gradient_scale = _operand(spec, dy, WGRAD, GRADIENT, draw, amax=largest[WGRAD])
        dweight = _contract(left, right, (0, 0), x.dtype) * (scale * gradient_scale)
        dweight = dweight[: weight.shape[0], : weight.shape[1]]
        if spec.axes:
            dweight = shard_parameter(dweight, spec.axes[number])
        dweights.append(dweight.astype(weight.dtype))
    return dx[: x.shape[0], : x.shape[1]].astype(x.dtype), tuple(dweights), None, None, None


dot.defvjp(_dot_forward, _dot_backward)


def grouped_dot(
    spec: Spec,
    x: Float[Array, "rows In"],
    weight: Float[Array, "_ In _"],
    group_sizes: Int[Array, "E"],
    words: Array | None,
    rows: Int[Array, "rows"],
    *,
    codes: Codes | None = None,
) -> Float[Array, "rows _"]:
    """Each row times its expert's matrix; every expert's rows and matrix are tensors of their own.

    Groups start at multiples of the blocks' rows and are filled up with rows of zeros, as
    `sort_by_expert` with `align` makes them. `weight` may be this device's part, cut as
    `spec.cuts` say: whole experts are quantised where they lie, and then gathered.
    """
    spec, weight = with_whole_experts(spec, weight, x.dtype)
    padding = [(0, -size % spec.step) for size in weight.shape[1:]]
    y = _grouped_dot(
        spec,
        jnp.pad(x, ((0, 0), padding[0])),
        jnp.pad(weight, ((0, 0), *padding)),
        group_sizes,
        (words, rows),
        codes,
    )
    return y[:, : weight.shape[2]]


def with_whole_experts(spec: Spec, weight: Array, dtype: jnp.dtype) -> tuple[Spec, Array]:
    """The weight with every matrix whole, where devices share more than their number."""
    if not any(axis > 0 for axis, _ in spec.cuts.gathered):
        return spec, weight
    cuts = dataclasses.replace(spec.cuts, gathered=())
    return dataclasses.replace(spec, cuts=cuts), gathered(weight, spec.cuts, dtype)


@dataclasses.dataclass(frozen=True)
class GroupedRows:
    """Rows of experts, all of them or a part that ends at a block, and the products they are in.

    `amax` of a method holds each expert's largest magnitude of all its rows, everywhere; where it
    is None these are all, and devices compare theirs. A weight is `expert_operand`'s.
    """

    spec: Spec
    sizes: Int[Array, "E"]
    words: Array | None
    numbers: Int[Array, "rows"]

    def forward(self, x: Array, weight: tuple[Array, Array], amax: Array | None = None) -> Array:
        """Each row times its expert's matrix."""
        return self._times(x, weight, FPROP, INPUT, amax).astype(self.spec.out_dtypes[0])

    def backward(self, dy: Array, weight: tuple[Array, Array], amax: Array | None = None) -> Array:
        """The gradient of the rows."""
        return self._times(dy, weight, DGRAD, GRADIENT, amax)

    def outer(
        self, x: Array, dy: Array, amax: tuple[Array | None, Array | None] = (None, None)
    ) -> Float[Array, "E In Out"]:
        """These rows' part of the matrices' gradient; float32."""
        left, scale = self._operand(x, WGRAD, INPUT, amax[0])
        right, gradient_scale = self._operand(dy, WGRAD, GRADIENT, amax[1])
        left, right, scale = left.astype(x.dtype), right.astype(x.dtype), scale * gradient_scale
        return grouped_outer(left, right, self.sizes, scale=scale, **self.spec.kernel)

    def largest(self, x: Array, product: str, side: str) -> Float[Array, "E"]:
        """Each expert's largest magnitude among these rows, as that operand takes them."""
        treatment = treatments(self.spec.format, self.spec.options)[product, side]
        return operands.largest_of_groups(x, treatment, self._groups(x))

    def _times(
        self, x: Array, weight: tuple[Array, Array], product: str, side: str, amax: Array | None
    ) -> Array:
        left, scale = self._operand(x, product, side, amax)
        right, weight_scale = weight
        return grouped_matmul(
            *(left.astype(x.dtype), right.astype(x.dtype), self.sizes),
            transpose_rhs=product == DGRAD,
            scale=scale * weight_scale,
            **self.spec.kernel,
        )

    def _operand(
        self, x: Array, product: str, side: str, amax: Array | None
    ) -> tuple[Array, Array]:
        draw = _draw(self.spec, self.words, self.numbers, product, side)
        return _operand(self.spec, x, product, side, draw, self._groups(x), amax=amax)

    def _groups(self, x: Array) -> Groups:
        step, last = self.spec.step, self.sizes.shape[0] - 1
        starts = step * jnp.arange(x.shape[0] // step, dtype=jnp.int32)
        of_rows = jnp.searchsorted(jnp.cumsum(self.sizes), starts, side="right")
        of_rows = jnp.minimum(of_rows, last).astype(jnp.int32)  # zeros past all belong to any
        return Groups(of_rows, last + 1, owners=self.spec.cuts.owners)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(spec, x, weight, group_sizes, draws, codes) -> Array:
    grouped = GroupedRows(spec, group_sizes, *draws)
    return grouped.forward(x, expert_operand(spec, weight, FPROP, codes))


def _grouped_forward(spec, *arrays):
    return _grouped_dot(spec, *arrays), arrays


def _grouped_backward(spec, residuals, dy):
    x, weight, group_sizes, draws, codes = residuals
    grouped = GroupedRows(spec, group_sizes, *draws)
    dx = grouped.backward(dy, expert_operand(spec, weight, DGRAD, codes)).astype(x.dtype)
    dweight = scattered(grouped.outer(x, dy), spec.cuts).astype(weight.dtype)
    return dx, dweight, None, None, None


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


def _weight_operands(
    spec: Spec, weights: tuple[Array, ...], product: str, codes: tuple[Codes | None, ...]
) -> list[tuple[Array, Array]]:
    """Weights quantised where their parts lie, then gathered: bfloat16 holds them exactly."""
    if all(one is not None for one in codes):
        found = [one.operand() for one in codes]
    else:
        amax = operands.largest(weights)
        found = [_operand(spec, weight, product, WEIGHT, amax=amax) for weight in weights]
    whole = []
    for number, (weight, (operand, scale)) in enumerate(zip(weights, found, strict=True)):
        if spec.axes and operand.shape == weight.shape:
            operand = gather_parameter(operand.astype(jnp.bfloat16), spec.axes[number])
        whole.append((operand, scale))
    return whole


def expert_operand(
    spec: Spec, weight: Float[Array, "_ In Out"], product: str, codes: Codes | None = None
) -> tuple[Float[Array, "E In Out"], Float[Array, "E"]]:
    """All experts' matrices, quantised where they lie and then gathered: bfloat16 holds them
    exactly."""
    if codes is not None:
        operand, scale = codes.operand()
    else:
        operand, scale = _quantized_experts(spec, weight, product)
    if not spec.cuts.gathered:
        return operand, scale
    return whole(operand, spec.cuts, jnp.bfloat16), whole(scale, spec.cuts, scale.dtype)


def _quantized_experts(spec: Spec, weight: Array, product: str) -> tuple[Array, Array]:
    count, rows, columns = weight.shape
    blocks = rows // spec.step
    groups = Groups(jnp.repeat(jnp.arange(count), blocks), count, shared=False)
    flat = weight.reshape(count * rows, columns)
    operand, scale = _operand(spec, flat, product, WEIGHT, groups=groups)
    return operand.reshape(weight.shape), scale


def _draw(
    spec: Spec, words: Array | None, rows: Array, product: str, side: str, number: int = 0
) -> Draw | None:
    """The random bits of an operand that is rounded stochastically; None for another.

    Without words the forward product rounds to the nearest, as evaluation and decoding do: what
    learns needs them all the same. `number` tells the weights of one product apart.
    """
    if treatments(spec.format, spec.options)[product, side].rounding != "stochastic":
        return None
    if words is None and product == FPROP:
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
