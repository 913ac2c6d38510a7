"""Every weight matmul of the model passes through here, so that precision is decided in one
place."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.precision import HIGH, ROLES
from nemotron_jax.quant import emulated, observe, packed
from nemotron_jax.quant.codes import Codes
from nemotron_jax.quant.operands import alignment
from nemotron_jax.sharding import shard_parameter
from nemotron_jax.sharding.weights import (
    Cuts,
    first_expert,
    gather_parameter,
    gathered,
    scattered,
    whole,
)
from nemotron_jax.types import Axes, Context, Packed, Rows, Weight
from pallas_kernels import (
    ExpertOrder,
    grouped_matmul,
    grouped_mlp,
    grouped_mlp_gradients,
    nvfp4,
)

EXPERT_ROLES = ("expert_up", "expert_down")


def dot(
    x: Float[Array, "... In"],
    weight: Weight,
    *,
    role: str,
    context: Context,
    rows: Rows = Rows(),
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "... Out"]:
    """`x @ weight` in the compute dtype, accumulated in float32.

    `weight` is the master; its cast to the compute dtype happens here, before its parts are
    gathered, and its gradient comes back in the master's dtype from a float32 accumulation. `role`
    names the matmul for the precision recipe: where that wants a lower format, operands are
    quantised and dequantised, with random bits by the tokens' numbers in `rows`.
    """
    return dot_together(x, [weight], role=role, context=context, rows=rows, out_dtypes=[out_dtype])[
        0
    ]


def dot_together(
    x: Float[Array, "... In"],
    weights: Sequence[Weight],
    *,
    role: str,
    context: Context,
    out_dtypes: Sequence[jnp.dtype | None],
    rows: Rows = Rows(),
) -> list[Float[Array, "... _"]]:
    """`x` times each weight, each result in its own dtype (None: the compute dtype).

    In a lower format the weights are one matrix, with one largest magnitude, as the published
    checkpoints' fused projections are; they stay apart, so that devices may cut each.
    """
    dtypes = [jnp.dtype(dtype or context.dtype) for dtype in out_dtypes]
    x = x.astype(context.dtype)
    observe.observe(role, x)
    if context.format(role) == HIGH:
        pairs = zip(weights, dtypes, strict=True)
        return [_dot(x, weight.value, weight.axes, dtype) for weight, dtype in pairs]
    flat = x.reshape(-1, x.shape[-1])
    numbers = jnp.arange(flat.shape[0]) if rows.numbers is None else rows.numbers.reshape(-1)
    masters = tuple(weight.value for weight in weights)
    axes = tuple(weight.axes for weight in weights)
    spec = spec_of(role, context, tuple(dtypes), axes)
    codes = tuple(weight.codes for weight in weights)
    products = emulated.dot(spec, flat, masters, words_of(role, rows), numbers, codes)
    return [y.reshape(*x.shape[:-1], -1) for y in products]


def row_alignment(context: Context) -> int:
    """Rows that each expert's group must be a multiple of, for `expert_mlp`."""
    return max(alignment(context.format(role)) for role in EXPERT_ROLES)


def expert_mlp(
    x: Float[Array, "rows L"],
    up: Float[Array, "_ _ _"] | Packed,
    down: Float[Array, "_ _ _"] | Packed,
    order: ExpertOrder,
    adapters: Sequence[Float[Array, "E _ _"]] = (),
    *,
    context: Context,
    rows: Rows = Rows(),
    cuts: tuple[Cuts, Cuts] = (Cuts(), Cuts()),
    codes: tuple[Codes | None, Codes | None] = (None, None),
) -> Float[Array, "rows L"]:
    """Squared-ReLU experts over rows sorted by expert; rows past the groups' sum give zeros.

    `up` [E L F] and `down` [E F L] are masters, or inside `local` this device's parts of them, cut
    as `cuts` say: they are gathered here, and their gradients scattered, one at a time. `codes` are
    those of up and down, where they were made beforehand.
    `adapters` are A and B of up, then of down: each product gets `x A B` of its input added, in
    high precision. Raises ValueError for codes in an emulated format, and where a gradient is asked
    for through codes that no adapters train beside.
    """
    x, sizes = x.astype(context.dtype), order.group_sizes
    kernel = {"implementation": context.kernel("grouped_matmul"), "target": context.target}
    if isinstance(up, Packed):
        check_high(up, context)
        if not adapters:
            hidden = packed.product(x, up, sizes, cuts[0], kernel, activation="relu2")
            return packed.product(hidden, down, sizes, cuts[1], kernel)
    if observe.observed():
        hidden = grouped_matmul(x, gathered(up, cuts[0], context.dtype), sizes, **kernel)
        observe.observe(EXPERT_ROLES[0], x)
        observe.observe(EXPERT_ROLES[1], jnp.square(jax.nn.relu(hidden)))
    if not adapters and all(context.format(role) == HIGH for role in EXPERT_ROLES):
        return _mlp(cuts, tuple(kernel.values()), x, up, down, sizes)
    entries = row_numbers(order, rows, context, cuts[0].owners)
    grouped = functools.partial(grouped_matmul, **kernel)
    each = enumerate(zip(EXPERT_ROLES, (up, down), cuts, codes, strict=True))
    for number, (role, weight, cut, kept) in each:
        if role == EXPERT_ROLES[1]:
            x = jnp.square(jax.nn.relu(x))
        added = jnp.zeros((), x.dtype)
        if adapters:
            a, b = adapters[2 * number : 2 * number + 2]
            added = grouped(grouped(x, a, sizes), b, sizes)
        if isinstance(weight, Packed):
            x = packed.product(x, weight, sizes, cut, kernel) + added
        elif context.format(role) == HIGH:
            x = grouped(x, gathered(weight, cut, context.dtype), sizes) + added
        else:
            spec = spec_of(role, context, (jnp.dtype(context.dtype),), cuts=cut)
            drawn = words_of(role, rows), entries
            x = emulated.grouped_dot(spec, x, weight, sizes, *drawn, codes=kept) + added
    return x


def row_numbers(
    order: ExpertOrder, rows: Rows, context: Context, owners: Sequence[str]
) -> Int[Array, "rows"]:
    """The numbers by which rows of an order draw random bits: by token and choice; those that fill
    a group up by expert and place from its end, so that they do not depend on which experts share
    a device. `rows` are all tokens'."""
    tokens, choices = order.entry_row.shape
    numbers = jnp.arange(tokens) if rows.numbers is None else rows.numbers.reshape(-1)
    entries = numbers[order.row_token] * choices + order.row_entry % choices
    sizes, row = order.group_sizes, jnp.arange(entries.shape[0])
    ends = jnp.cumsum(sizes)
    group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), sizes.shape[0] - 1)
    expert = first_expert(owners, sizes.shape[0]) + group
    fillers = expert * row_alignment(context) + ends[group] - 1 - row
    return jnp.where(order.holds, entries, ~fillers)


def check_high(up: Packed, context: Context) -> None:
    """Raise ValueError where a recipe would quantise what is codes already."""
    if any(context.format(role) != HIGH for role in EXPERT_ROLES):
        raise ValueError(
            f"{up.name} are NVFP4 codes, and the precision recipe would quantise them again; use "
            "an Execution without one, or take unpacked(model)"
        )


def spec_of(
    role: str,
    context: Context,
    out_dtypes: tuple[jnp.dtype, ...],
    axes: tuple[Axes, ...] = (),
    cuts: Cuts = Cuts(),
) -> emulated.Spec:
    """How a product of this role is emulated: format, rounding, kernel, what devices share."""
    options = context.execution.precision.nvfp4
    kernel = context.kernel("grouped_matmul"), context.target
    return emulated.Spec(role, context.format(role), options, out_dtypes, axes, cuts, *kernel)


def words_of(role: str, rows: Rows) -> Array | None:
    """Random words of this role's matmul; None where no key was given."""
    return None if rows.words is None else nvfp4.fold(rows.words, ROLES.index(role))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x: Array, weight: Array, axes: Axes, out_dtype: jnp.dtype) -> Array:
    return _contract(x, _whole(weight, axes, x), x.ndim - 1, 0).astype(out_dtype)


def _dot_forward(x: Array, weight: Array, axes: Axes, out_dtype: jnp.dtype) -> tuple[Array, tuple]:
    return _dot(x, weight, axes, out_dtype), (x, weight)


def _dot_backward(
    axes: Axes, out_dtype: jnp.dtype, residuals: tuple, dy: Array
) -> tuple[Array, Array]:
    x, weight = residuals
    dy = dy.astype(x.dtype)
    dx = _contract(dy, _whole(weight, axes, x), dy.ndim - 1, 1).astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    dweight = _contract(rows, dy.reshape(-1, dy.shape[-1]), 0, 0)
    return dx, shard_parameter(dweight, axes).astype(weight.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(
    cuts: tuple[Cuts, Cuts],
    kernel: tuple[str | None, str | None],
    x: Array,
    up: Array,
    down: Array,
    sizes: Array,
) -> Array:
    implementation, target = kernel
    matrices = _experts(cuts, x, up, down)
    return grouped_mlp(x, *matrices, sizes, implementation=implementation, target=target)


def _mlp_forward(cuts: tuple, kernel: tuple, *operands: Array) -> tuple[Array, tuple]:
    return _mlp(cuts, kernel, *operands), operands


def _mlp_backward(cuts: tuple, kernel: tuple, operands: tuple, dy: Array) -> tuple:
    x, up, down, sizes = operands
    implementation, target = kernel
    dx, dup, ddown = grouped_mlp_gradients(
        *(x, *_experts(cuts, x, up, down), sizes, dy),
        implementation=implementation,
        target=target,
    )
    dup, ddown = (scattered(*one) for one in zip((dup, ddown), cuts, strict=True))
    return dx, dup.astype(up.dtype), ddown.astype(down.dtype), None


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _experts(cuts: tuple, x: Array, *parts: Array) -> list[Array]:
    """All experts' matrices in the dtype of `x`."""
    return [whole(part, cut, x.dtype) for part, cut in zip(parts, cuts, strict=True)]


def _whole(weight: Array, axes: Axes, x: Array) -> Array:
    """The weight in the dtype of `x`; cast first, so that it is gathered in that."""
    return gather_parameter(weight.astype(x.dtype), axes)


def _contract(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    numbers = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)
