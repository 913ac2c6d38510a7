"""Mamba-2 mixer: projections, causal convolution, selective state space, gated norm."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.model import MambaConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear, project_together
from nemotron_jax.layers.norm import GatedGroupNorm
from nemotron_jax.layers.state import chosen
from nemotron_jax.sharding import local, shard
from nemotron_jax.types import Axes, Context, Rows
from pallas_kernels import (
    causal_conv1d,
    conv_tail,
    ssd_outputs,
    ssd_replay,
    ssd_scan,
    ssd_step,
)


class _Shared(NamedTuple):
    """Logical axes of what the recurrence takes: a group's heads go where its B and C go."""

    heads: Axes  # [B T M ...]
    groups: Axes  # [B T G ...]
    vector: Axes  # [M]
    state: Axes  # [B M ...]

    @classmethod
    def of(cls, heads: int, groups: int) -> "_Shared":
        """Of so many heads in so many groups."""
        head, group = ("mamba_heads", heads // groups), "mamba_groups"
        return cls(("batch", None, head), ("batch", None, group), (head,), ("batch", head))

    @property
    def operands(self) -> tuple[Axes, ...]:
        """Of x, dt, A, B, C and D."""
        heads, groups, vector, _ = self
        return heads, heads, vector, groups, groups, vector


def _tail_axes(array: Array, name: str, groups: int) -> Axes:
    """Logical axes of a convolution's inputs [B, T, channels]."""
    return ("batch", None, (name, array.shape[-1] // groups))


_CHANNELS = ("mamba_inner", "mamba_groups", "mamba_groups")  # of x, B and C


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
    """What a Mamba-2 layer remembers of a row, whatever its length."""

    ssm: Float[Array, "B M P N"]  # float32
    x_tail: Float[Array, "B W-1 I"]  # the last inputs of the convolutions, oldest first
    b_tail: Float[Array, "B W-1 GN"]
    c_tail: Float[Array, "B W-1 GN"]

    capacity: ClassVar[None] = None
    goes_back: ClassVar[bool] = False

    @classmethod
    def zeros(cls, config: MambaConfig, batch: int, dtype: str) -> "MambaState":
        """The state before a first token: float32 sums, and tails of the convolution in `dtype`."""
        heads = (config.num_heads, config.head_dim, config.state_size)
        tail = (batch, config.conv_width - 1)
        shared = config.num_groups * config.state_size
        return cls(
            ssm=jnp.zeros((batch, *heads), jnp.float32),
            x_tail=jnp.zeros((*tail, config.inner_width), dtype),
            b_tail=jnp.zeros((*tail, shared), dtype),
            c_tail=jnp.zeros((*tail, shared), dtype),
        )

    @property
    def tails(self) -> tuple[Array, Array, Array]:
        """Of x, B and C."""
        return self.x_tail, self.b_tail, self.c_tail

    @property
    def groups(self) -> int:
        """How many share B and C."""
        return self.b_tail.shape[-1] // self.ssm.shape[-1]

    def shared(self, rows: str | None = "batch") -> "MambaState":
        """This state laid out over the mesh: heads and groups as devices share them, rows by the
        logical axis `rows` (None: every device has all)."""
        _, *heads = _Shared.of(self.ssm.shape[1], self.groups).state
        laid = (
            shard(tail, rows, *_tail_axes(tail, name, self.groups)[1:])
            for tail, name in zip(self.tails, _CHANNELS, strict=True)
        )
        return MambaState(shard(self.ssm, rows, *heads, None, None), *laid)

    def where(self, rows: Bool[Array, "B"], other: "MambaState") -> "MambaState":
        """The given rows of this state, and the rest of the other."""
        return jax.tree.map(lambda mine, theirs: chosen(rows, mine, theirs), self, other)

    def emptied(self, rows: Bool[Array, "B"]) -> "MambaState":
        """The state with the given rows as new."""
        return jax.tree.map(lambda a: chosen(~rows, a, jnp.zeros((), a.dtype)), self)

    def rounded(self, like: "MambaState", narrow: Callable[[Array], Array]) -> "MambaState":
        """The state with `ssm` in the other's dtype, by `narrow` where that is another."""
        if self.ssm.dtype == like.ssm.dtype:
            return self
        return dataclasses.replace(self, ssm=narrow(self.ssm))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaReplay:
    """A state before a few tokens and what those tokens are to it: of which the state after any
    number of them is made, at the price of one pass. States after each would be T times its size.
    """

    before: MambaState
    inputs: tuple[Array, Array, Array]  # [B T ...], of the convolutions of x, B and C
    x: Float[Array, "B T M P"]  # of the recurrence
    dt: Float[Array, "B T M"]
    A: Float[Array, "M"]
    b: Float[Array, "B T G N"]

    capacity: ClassVar[None] = None
    goes_back: ClassVar[bool] = False

    def select(self, count: Int[Array, "B"]) -> MambaState:
        """The state after the first `count` tokens; a count of 0 is the state before, bit for
        bit."""
        replay = lambda *operands: ssd_replay(*operands[:-1], lengths=operands[-1])
        shared = _Shared.of(self.x.shape[2], self.b.shape[2])
        axes = (*shared.operands[:4], shared.state, ("batch",))
        run = local(replay, axes, shared.state)
        ssm = run(self.x, self.dt, self.A, self.b, self.before.ssm, count)

        def tail(inputs: Array, before: Array, name: str) -> Array:
            axes = _tail_axes(inputs, name, self.b.shape[2])
            return local(conv_tail, (axes, axes, ("batch",)), axes)(inputs, before, count)

        return MambaState(ssm, *map(tail, self.inputs, self.before.tails, _CHANNELS))


class CausalConv(nnx.Module):
    """Depthwise causal convolution with SiLU; the last tap multiplies the current token."""

    def __init__(
        self, config: MambaConfig, channels: int, axis: tuple[str, int], *, rngs: nnx.Rngs
    ) -> None:
        bound = 1 / math.sqrt(config.conv_width)
        draw = lambda shape: jax.random.uniform(
            rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound
        )
        self.weight = nnx.Param(draw((config.conv_width, channels)), axes=("conv_width", axis))
        self.bias = nnx.Param(draw((channels,)), axes=(axis,)) if config.conv_bias else None

    def __call__(
        self,
        x: Float[Array, "B T channels"],
        rows: Rows,
        tail: Array | None,
        context: Context,
    ) -> tuple[Float[Array, "B T channels"], Array]:
        def convolve(x, weight, bias, tail, documents, lengths):
            # Cast here and not outside, so that devices add up their float32 gradients.
            return causal_conv1d(
                x,
                weight.astype(x.dtype),
                None if bias is None else bias.astype(x.dtype),
                tail=tail,
                segment_ids=documents,
                lengths=lengths,
                implementation=context.kernel("causal_conv1d"),
                target=context.target,
            )

        bias = None if self.bias is None else self.bias[...]
        by_row, channel = ("batch",), self.weight.axes[1]
        of_rows = ("batch", None, channel)
        in_axes = (of_rows, (None, channel), (channel,), of_rows, by_row, by_row)
        run = local(convolve, in_axes, (of_rows, of_rows))
        return run(x, self.weight[...], bias, tail, rows.documents, rows.lengths)


class Mamba2(nnx.Module):
    """Selective state space with heads in groups that share B and C.

    A_log, D, dt_bias and the convolution stay float32. The step size is clamped only where the
    config gives a `time_step_limit`.
    """

    def __init__(
        self,
        config: MambaConfig,
        width: int,
        init: Init,
        *,
        epsilon: float,
    ) -> None:
        self.config = config
        inner, shared = config.inner_width, config.num_groups * config.state_size
        bias, rngs = config.projection_bias, init.rngs
        project = lambda axis, size: Linear(
            "mamba_in", ("width", axis), (width, size), init, bias=bias
        )
        # The heads of a group go where its B and C go.
        channels = ("mamba_inner", inner // config.num_groups)
        heads = ("mamba_heads", config.num_heads // config.num_groups)
        groups = ("mamba_groups", config.state_size)
        self.z, self.x = project(channels, inner), project(channels, inner)
        self.b, self.c = project(groups, shared), project(groups, shared)
        self.dt = project(heads, config.num_heads)
        self.x_conv = CausalConv(config, inner, channels, rngs=rngs)
        self.b_conv = CausalConv(config, shared, groups, rngs=rngs)
        self.c_conv = CausalConv(config, shared, groups, rngs=rngs)
        self.A_log, self.D, self.dt_bias = _initial_dynamics(config, rngs)
        self.norm = GatedGroupNorm(inner, config.num_groups, epsilon)
        self.out = Linear("mamba_out", (channels, "width"), (inner, width), init.out, bias=bias)

    def __call__(
        self,
        u: Float[Array, "B T D"],
        rows: Rows,
        state: MambaState | None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], MambaState | MambaReplay | None, None]:
        tails = (None,) * 3 if state is None else state.tails
        # In the order of the published in_proj, which a quantiser sees as one matrix.
        z, x, b, c, dt = project_together(
            (self.z, self.x, self.b, self.c, self.dt),
            u,
            context,
            rows,
            (None,) * 4 + (jnp.float32,),  # dt: logs of decays, dt A, add up over tokens
        )
        inputs = (x, b, c)
        x, x_tail = self.x_conv(x, rows, tails[0], context)
        b, b_tail = self.b_conv(b, rows, tails[1], context)
        c, c_tail = self.c_conv(c, rows, tails[2], context)
        x, b, c = self._by_head(x, b, c)
        operands = (x, self._step_size(dt), -jnp.exp(self.A_log[...]), b, c, self.D[...])
        ssm = None if state is None else state.ssm
        if state is not None and context.every_state:
            shared = self._shared
            run = local(ssd_outputs, (*shared.operands, shared.state), shared.heads)
            y, after = run(*operands, ssm), MambaReplay(state, inputs, *operands[:4])
        else:
            y, ssm = self._scan(operands, rows, ssm, context)
            after = None if state is None else MambaState(ssm, x_tail, b_tail, c_tail)
        y = y.reshape(*y.shape[:2], self.config.inner_width)
        return self.out(self.norm(y, z), context, rows), after, None

    @property
    def _shared(self) -> _Shared:
        return _Shared.of(self.config.num_heads, self.config.num_groups)

    def _by_head(self, x: Array, b: Array, c: Array) -> tuple[Array, Array, Array]:
        """x by head, and B and C by group."""
        shape, config = x.shape[:2], self.config
        of_groups = lambda v: v.reshape(*shape, config.num_groups, config.state_size)
        x = x.reshape(*shape, config.num_heads, config.head_dim)
        return x, of_groups(b), of_groups(c)

    def _step_size(self, raw: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        dt = jax.nn.softplus(raw + self.dt_bias[...])
        low, high = self.config.time_step_limit
        high = math.inf if high > float(jnp.finfo(jnp.float32).max) else high
        # softplus is above 0 already: limits of 0 and infinity, those published, clip nothing.
        return dt if (low, high) == (0.0, math.inf) else jnp.clip(dt, low, high)

    def _scan(
        self, operands: tuple, rows: Rows, ssm: Array | None, context: Context
    ) -> tuple[Array, Array]:
        def scan(*operands: Array | None) -> tuple[Array, Array]:
            *operands, ssm, documents, lengths = operands
            if ssm is not None and operands[0].shape[1] == 1:  # decoding: one token a row
                return ssd_step(*operands, ssm, lengths=lengths, every_state=False)
            return ssd_scan(
                *operands,
                initial_state=ssm,
                segment_ids=documents,
                lengths=lengths,
                chunk=self.config.chunk,
                implementation=context.kernel("ssd_scan"),
                target=context.target,
            )

        by_row = ("batch",)
        shared = self._shared
        in_axes = (*shared.operands, shared.state, by_row, by_row)
        run = local(scan, in_axes, (shared.heads, shared.state))
        return run(*operands, ssm, rows.documents, rows.lengths)


def _initial_dynamics(
    config: MambaConfig, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
    """A uniform in (1, 16), D one, step sizes log-uniform in their range through softplus."""
    shape = (config.num_heads,)
    A = jax.random.uniform(rngs.params(), shape, jnp.float32, minval=1.0, maxval=16.0)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, minval=low, maxval=high))
    dt = jnp.maximum(dt, config.time_step_floor)
    dt_bias = dt + jnp.log(-jnp.expm1(-dt))  # inverse of softplus
    parameter = lambda value: nnx.Param(value, axes=("mamba_heads",))
    return parameter(jnp.log(A)), parameter(jnp.ones(shape, jnp.float32)), parameter(dt_bias)
