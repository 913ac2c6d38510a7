"""Experts' weighted sums in a lower format, rows in windows.

An operand is scaled by its expert's largest magnitude, of all windows and on all devices that have
rows of this expert. So each pass over the windows finds the magnitudes that the next one scales by,
and devices compare theirs between passes. What a pass made last, the next one, which runs the other
way round, finds again: where one window holds all rows no product is made twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.quant import windows
from nemotron_jax.quant.codes import Codes
from nemotron_jax.quant.emulated import GroupedRows, Spec, expert_operand, with_whole_experts
from nemotron_jax.quant.operands import DGRAD, FPROP, GRADIENT, INPUT, WEIGHT, WGRAD, treatments
from nemotron_jax.quant.windows import Loop, Window
from nemotron_jax.sharding.weights import max_over_devices, scattered
from pallas_kernels import ExpertOrder

Operand = tuple[Array, Array]  # quantised matrices and the factor of each expert's products


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a mix does, but for its arrays; a static argument."""

    rows: int  # of a window
    up: Spec
    down: Spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Tokens, their experts' weights in their sums, the matrices, and where random bits come from:
    the words of up's and down's products, and the numbers of the order's rows."""

    x: Float[Array, "N L"]
    weights: Float[Array, "N R"]
    up: Float[Array, "_ _ _"]
    down: Float[Array, "_ _ _"]
    words: tuple[Array | None, Array | None]
    numbers: Int[Array, "rows"]
    order: ExpertOrder
    codes: tuple[Codes | None, Codes | None] = (None, None)  # of up and down, made beforehand


def mix(settings: Settings, given: Given) -> Float[Array, "N L"]:
    """`mix_in_windows` where up and down are both in lower formats."""
    x, up, down = given.x, given.up, given.down
    up_spec, up = with_whole_experts(settings.up, up, x.dtype)
    down_spec, down = with_whole_experts(settings.down, down, x.dtype)
    latent, step = x.shape[1], max(up_spec.step, down_spec.step)
    fill = lambda array: [(0, -size % step) for size in array.shape]
    x = jnp.pad(x, [(0, 0), fill(x)[1]])
    up, down = (jnp.pad(matrix, [(0, 0), *fill(matrix)[1:]]) for matrix in (up, down))
    settings = Settings(settings.rows, up_spec, down_spec)
    return _mix(settings, dataclasses.replace(given, x=x, up=up, down=down))[:, :latent]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """What was made of one window, -1 of none."""

    index: Int[Array, ""]
    values: Any

    @staticmethod
    def nothing(*like: jax.ShapeDtypeStruct) -> "Held":
        """Room for values of these shapes, of no window yet."""
        return Held(jnp.int32(-1), tuple(jnp.zeros(one.shape, one.dtype) for one in like))

    def of(self, window: Window, make: Callable[[Window], Any]) -> "Held":
        """What `make` makes of a window, or this where that was done."""
        values = jax.lax.cond(self.index == window.index, lambda: self.values, lambda: make(window))
        return Held(window.index, values)


@dataclasses.dataclass(frozen=True)
class _Experts:
    """One device's experts, and the windows of their rows."""

    settings: Settings
    x: Float[Array, "N L"]
    words: tuple[Array | None, Array | None]
    loop: Loop
    up: Operand
    down: Operand

    def products(self, window: Window) -> tuple[GroupedRows, GroupedRows]:
        """Up's and down's, with this window's rows."""
        specs = (self.settings.up, self.settings.down)
        up, down = (
            GroupedRows(spec, window.sizes, words, window.numbers)
            for spec, words in zip(specs, self.words, strict=True)
        )
        return up, down

    def inner(self, window: Window, of_x: Array) -> Float[Array, "W F"]:
        """Up's output."""
        return self.products(window)[0].forward(window.of(self.x), self.up, of_x)

    def largest_of_x(self) -> Float[Array, "E"]:
        """Of each expert's rows of x, as up takes them."""

        def find(window: Window, found: Array) -> Array:
            up, _ = self.products(window)
            return jnp.maximum(found, up.largest(window.of(self.x), FPROP, INPUT))

        return self.everywhere(self.loop.over(find, self.none()))

    @property
    def wide(self) -> jax.ShapeDtypeStruct:
        """The shape of `inner`."""
        return jax.ShapeDtypeStruct((self.loop.rows, self.up[0].shape[2]), self.x.dtype)

    def none(self, *count: int) -> Float[Array, "... E"]:
        """Where a search for largest magnitudes begins."""
        return jnp.zeros((*count, self.up[0].shape[0]), jnp.float32)

    def everywhere(self, largest: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """Of all devices that have rows of these experts."""
        return max_over_devices(largest, owners=self.settings.up.cuts.owners)


def _hidden(inner: Array) -> Array:
    return jnp.square(jax.nn.relu(inner))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(settings: Settings, given: Given) -> Array:
    own = _experts(settings, given)
    of_x = own.largest_of_x()

    def find(window: Window, carry: tuple) -> tuple:
        inner = own.inner(window, of_x)
        here = own.products(window)[1].largest(_hidden(inner), FPROP, INPUT)
        return jnp.maximum(carry[0], here), Held(window.index, (inner,))

    found, held = own.loop.over(find, (own.none(), Held.nothing(own.wide)))
    of_hidden = own.everywhere(found)

    def add(window: Window, total: Array) -> Array:
        (inner,) = held.of(window, lambda window: (own.inner(window, of_x),)).values
        y = own.products(window)[1].forward(_hidden(inner), own.down, of_hidden)
        return window.add(total, y.astype(jnp.float32) * window.weight[:, None])

    return own.loop.over(add, jnp.zeros(given.x.shape, jnp.float32), back=True)


def _mix_forward(settings: Settings, given: Given) -> tuple[Array, Given]:
    return _mix(settings, given), given


def _mix_backward(settings: Settings, given: Given, dout: Array) -> tuple[Given]:
    own = _experts(settings, given)
    specs, matrices = (settings.up, settings.down), (given.up, given.down)
    turned = map(_turned, specs, matrices, (own.up, own.down))
    dout = windows.as_it_came(dout, own.x)
    back = _Backward(own, dout, own.largest_of_x(), *turned)
    of_down, held = back.look()
    of_up, held = back.look_further(of_down, held)
    dx, products, *sums = back.sums(of_down, of_up, held)
    dweights = own.loop.of_entries(products).astype(given.weights.dtype)
    each = zip(specs, matrices, sums, strict=True)
    parts = [scattered(total, spec.cuts).astype(one.dtype) for spec, one, total in each]
    return (Given(dx.astype(own.x.dtype), dweights, *parts, None, None, None, None),)


_mix.defvjp(_mix_forward, _mix_backward)


def _experts(settings: Settings, given: Given) -> _Experts:
    specs = (settings.up, settings.down)
    matrices = (given.up, given.down)
    up, down = map(expert_operand, specs, matrices, (FPROP, FPROP), given.codes)
    loop = Loop(settings.rows, given.order, given.weights, given.numbers)
    return _Experts(settings, given.x, given.words, loop, up, down)


def _turned(spec: Spec, weight: Array, forward: Operand) -> Operand:
    """The matrices as the rows' gradients take them: the same where blocks are square."""
    of = treatments(spec.format, spec.options)
    same = of[FPROP, WEIGHT] == of[DGRAD, WEIGHT]
    return forward if same else expert_operand(spec, weight, DGRAD)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The three passes of the gradient."""

    own: _Experts
    dout: Float[Array, "N L"]
    of_x: Float[Array, "E"]
    up: Operand
    down: Operand

    def given(self, window: Window) -> Float[Array, "W L"]:
        """The gradient of down's output."""
        return (window.of(self.dout) * window.weight[:, None]).astype(self.own.x.dtype)

    def look(self) -> tuple[Float[Array, "5 E"], Held]:
        """Largest magnitudes of x, of the hidden and of down's gradient, as products take them; the
        last window's `inner`."""
        own = self.own

        def find(window: Window, carry: tuple) -> tuple:
            up, down = own.products(window)
            inner, dy = own.inner(window, self.of_x), self.given(window)
            here = (
                up.largest(window.of(own.x), WGRAD, INPUT),
                down.largest(_hidden(inner), WGRAD, INPUT),
                down.largest(dy, WGRAD, GRADIENT),
                down.largest(dy, DGRAD, GRADIENT),
                down.largest(_hidden(inner), FPROP, INPUT),
            )
            return jnp.maximum(carry[0], jnp.stack(here)), Held(window.index, (inner,))

        found, held = own.loop.over(find, (own.none(5), Held.nothing(own.wide)))
        return own.everywhere(found), held

    def look_further(self, of_down: Array, held: Held) -> tuple[Float[Array, "2 E"], Held]:
        """Largest magnitudes of what up's gradients take; the first window's `inner` and its
        gradient."""
        own = self.own

        def find(window: Window, carry: tuple) -> tuple:
            found, inner, _ = carry
            inner = inner.of(window, lambda window: (own.inner(window, self.of_x),))
            gradient = self.of_inner(window, inner.values[0], of_down[3])
            up, _ = own.products(window)
            here = up.largest(gradient, WGRAD, GRADIENT), up.largest(gradient, DGRAD, GRADIENT)
            return jnp.maximum(found, jnp.stack(here)), inner, gradient

        start = (own.none(2), held, jnp.zeros(own.wide.shape, own.wide.dtype))
        found, inner, gradient = own.loop.over(find, start, back=True)
        return own.everywhere(found), Held(inner.index, (*inner.values, gradient))

    def of_inner(self, window: Window, inner: Array, amax: Array) -> Float[Array, "W F"]:
        """The gradient of `inner`."""
        _, down = self.own.products(window)
        hidden = down.backward(self.given(window), self.down, amax)
        return jax.vjp(_hidden, inner)[1](hidden.astype(inner.dtype))[0]

    def sums(self, of_down: Array, of_up: Array, held: Held) -> list[Array]:
        """Gradients of x, of each row's weight, of up and of down; float32."""
        own = self.own

        def make(window: Window) -> tuple:
            inner = own.inner(window, self.of_x)
            return inner, self.of_inner(window, inner, of_down[3])

        def add(window: Window, totals: tuple) -> tuple:
            dx, products, dup, ddown = totals
            inner, gradient = held.of(window, make).values
            (up, down), hidden = own.products(window), _hidden(inner)
            y = down.forward(hidden, own.down, of_down[4])
            product = jnp.sum(y.astype(jnp.float32) * window.of(self.dout), axis=1)
            products = jax.lax.dynamic_update_slice(products, product, (window.first,))
            ddown += down.outer(hidden, self.given(window), (of_down[1], of_down[2]))
            dup += up.outer(window.of(own.x), gradient, (of_down[0], of_up[0]))
            drows = up.backward(gradient, self.up, of_up[1])
            return window.add(dx, drows), products, dup, ddown

        shapes = (own.x.shape, (own.loop.room,), own.up[0].shape, own.down[0].shape)
        return own.loop.over(add, tuple(jnp.zeros(shape, jnp.float32) for shape in shapes))
