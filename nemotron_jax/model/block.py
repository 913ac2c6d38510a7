"""One layer of the stack: a pre-norm residual around one mixer."""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.attention import Attention
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.latent_moe import LatentMoE, RouterMetrics
from nemotron_jax.layers.mamba2 import Mamba2
from nemotron_jax.layers.mlp import MLP
from nemotron_jax.layers.norm import RMSNorm
from nemotron_jax.sharding import shard
from nemotron_jax.types import Context, Rows


class Block(nnx.Module):
    """`x + mixer(norm(x))`, the mixer of one kind: mamba, attention, moe or mlp."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs, dtype: str) -> None:
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.mixer = _mixer(config, kind, rngs, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        state: object,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], object, RouterMetrics | None]:
        y, state, metrics = self.mixer(self.norm(x), rows, state, context)
        return shard(x + y, "batch", "tokens", "width"), state, metrics


def make_stack(
    config: ModelConfig, letter: str, count: int, *, rngs: nnx.Rngs, dtype: str
) -> Block | None:
    """`count` blocks of one kind, their parameters stacked along a leading axis; None for none."""
    if count == 0:
        return None
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(
        lambda key: Block(config, BLOCK_KINDS[letter], rngs=nnx.Rngs(key), dtype=dtype)
    )(keys)


def _mixer(config: ModelConfig, kind: str, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
    # Megatron scales output projections by 1/sqrt(layers) in hybrid models, not 1/sqrt(2 layers).
    init = Init(rngs, config.init_std, config.init_std / math.sqrt(config.num_layers), dtype)
    if kind == "mamba":
        return Mamba2(config.mamba, config.width, init, epsilon=config.norm_epsilon)
    if kind == "attention":
        return Attention(config.attention, config.width, init)
    if kind == "moe":
        return LatentMoE(config.moe, config.width, init)
    return MLP("mlp", config.width, config.mlp.width, init, bias=config.mlp.projection_bias)
