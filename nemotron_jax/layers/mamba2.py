"""Mamba-2 mixer: projections, causal convolution, selective state space, gated norm."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.config.model import MambaConfig
from nemotron_jax.layers.linear import Linear, project_together
from nemotron_jax.layers.norm import GatedGroupNorm
from nemotron_jax.sharding import local
from nemotron_jax.types import Context, Rows
from pallas_kernels import causal_conv1d, ssd_scan, ssd_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
    """What a Mamba-2 layer remembers of a row, whatever its length.

    After a call with `every_state` each array has a token axis behind the batch: the state after
    each token.
    """

    ssm: Float[Array, "B M P N"]  # float32
    x_tail: Float[Array, "B W-1 I"]  # the last inputs of the convolutions, oldest first
    b_tail: Float[Array, "B W-1 GN"]
    c_tail: Float[Array, "B W-1 GN"]

    @classmethod
    def zeros(cls, config: MambaConfig, batch: int, dtype: str) -> "MambaState":
        heads = (config.num_heads, config.head_dim, config.state_size)
        tail = (batch, config.conv_width - 1)
        shared = config.num_groups * config.state_size
        return cls(
            ssm=jnp.zeros((batch, *heads), jnp.float32),
            x_tail=jnp.zeros((*tail, config.inner_width), dtype),
            b_tail=jnp.zeros((*tail, shared), dtype),
            c_tail=jnp.zeros((*tail, shared), dtype),
        )


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
                every_tail=context.every_state,
                implementation=context.kernel("causal_conv1d"),
                target=context.target,
            )

        bias = None if self.bias is None else self.bias[...]
        by_row, channel = ("batch",), self.weight.axes[1]
        whole = (("batch", None, channel), (None, channel), (channel,))
        run = local(convolve, (*whole, by_row, by_row, by_row), (by_row, by_row))
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
        *,
        epsilon: float,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        dtype: str = "float32",
    ) -> None:
        self.config = config
        inner, shared = config.inner_width, config.num_groups * config.state_size
        options = {"std": std, "rngs": rngs, "bias": config.projection_bias, "dtype": dtype}
        project = lambda axis, size: Linear("mamba_in", ("width", axis), (width, size), **options)
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
        options["std"] = out_std
        self.out = Linear("mamba_out", (channels, "width"), (inner, width), **options)

    def __call__(
        self,
        u: Float[Array, "B T D"],
        rows: Rows,
        state: MambaState | None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], MambaState | None, None]:
        tails = (None,) * 3 if state is None else (state.x_tail, state.b_tail, state.c_tail)
        # In the order of the published in_proj, which a quantiser sees as one matrix.
        z, x, b, c, dt = project_together(
            (self.z, self.x, self.b, self.c, self.dt),
            u,
            context,
            rows,
            (None,) * 4 + (jnp.float32,),
        )
        x, x_tail = self.x_conv(x, rows, tails[0], context)
        b, b_tail = self.b_conv(b, rows, tails[1], context)
        c, c_tail = self.c_conv(c, rows, tails[2], context)
        y, ssm = self._scan(
            (x, self._step_size(dt), b, c),
            rows,
            None if state is None else state.ssm,
            context,
        )
        y = self.out(self.norm(y, z), context, rows)
        return y, None if state is None else MambaState(ssm, x_tail, b_tail, c_tail), None

    def _step_size(self, raw: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        dt = jax.nn.softplus(raw + self.dt_bias[...])
        low, high = self.config.time_step_limit
        high = math.inf if high > float(jnp.finfo(jnp.float32).max) else high
        return dt if (low, high) == (0.0, math.inf) else jnp.clip(dt, low, high)

    def _scan(
        self, inputs: tuple, rows: Rows, ssm: Array | None, context: Context
    ) -> tuple[Array, Array]:
        x, dt, b, c = inputs
        shape, config = x.shape[:2], self.config
        x = x.reshape(*shape, config.num_heads, config.head_dim)
        b, c = (v.reshape(*shape, config.num_groups, config.state_size) for v in (b, c))

        def scan(*operands: Array | None) -> tuple[Array, Array]:
            *operands, ssm, documents, lengths = operands
            if ssm is not None and (shape[1] == 1 or context.every_state):
                options = {"lengths": lengths, "every_state": context.every_state}
                return ssd_step(*operands, ssm, **options)
            return ssd_scan(
                *operands,
                initial_state=ssm,
                segment_ids=documents,
                lengths=lengths,
                chunk=config.chunk,
                implementation=context.kernel("ssd_scan"),
                target=context.target,
            )

        by_row = ("batch",)
        heads, groups = ("batch", None, "mamba_heads"), ("batch", None, "mamba_groups")
        vector, state = ("mamba_heads",), ("batch", "mamba_heads")
        axes = (heads, heads, vector, groups, groups, vector, state, by_row, by_row)
        states = heads if ssm is not None and context.every_state else state
        A, D = -jnp.exp(self.A_log[...]), self.D[...]
        run = local(scan, axes, (heads, states))
        y, ssm = run(x, dt, A, b, c, D, ssm, rows.documents, rows.lengths)
        return y.reshape(*shape, config.inner_width), ssm


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
