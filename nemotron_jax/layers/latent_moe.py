"""LatentMoE: routed at full width, computed in the latent, beside a shared expert at full width."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.experts import Experts
from nemotron_jax.layers.linear import Linear
from nemotron_jax.layers.mlp import MLP
from nemotron_jax.layers.router import Router, balance_loss
from nemotron_jax.types import Context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterMetrics:
    """What one MoE layer reports of one call."""

    load: Float[Array, "E"]  # valid tokens sent to each expert
    aux_loss: Float[Array, ""]


class LatentMoE(nnx.Module):
    """One latent down- and up-projection a layer, shared by all experts; the shared expert bypasses
    them."""

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        dtype: str = "float32",
    ) -> None:
        self.config = config
        latent = width if config.latent_width is None else config.latent_width
        options = {"rngs": rngs, "dtype": dtype}
        self.router = Router(config, width, std=std, rngs=rngs)
        if config.latent_width is None:
            self.latent_down = self.latent_up = None
        else:
            options["bias"] = config.projection_bias
            self.latent_down = Linear(
                "latent_down", ("width", "latent"), (width, latent), std=std, **options
            )
            self.latent_up = Linear(
                "latent_up", ("latent", "width"), (latent, width), std=out_std, **options
            )
        self.experts = Experts(config, latent, std=std, out_std=out_std, rngs=rngs, dtype=dtype)
        self.shared = MLP(
            "shared",
            width,
            config.shared_width,
            std=std,
            out_std=out_std,
            rngs=rngs,
            bias=config.projection_bias,
            dtype=dtype,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int[Array, "B T"] | None,
        state: None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], None, RouterMetrics]:
        flat = x.reshape(-1, x.shape[-1])
        index, weights, scores = self.router(flat)
        valid = context.valid(x.shape[1])
        latent = flat if self.latent_down is None else self.latent_down(flat, context)
        mixed, load = self.experts(
            latent, index, weights, None if valid is None else valid.reshape(-1), context
        )
        routed = mixed if self.latent_up is None else self.latent_up(mixed, context)
        shared, _, _ = self.shared(x, segments, state, context)
        metrics = RouterMetrics(
            load=load.astype(jnp.float32),
            aux_loss=balance_loss(
                scores.reshape(*x.shape[:2], -1),
                self.config.experts_per_token,
                _sequences(segments, context),
                valid,
            ),
        )
        return routed.reshape(x.shape) + shared, None, metrics


def _sequences(segments: Array | None, context: Context) -> Array | None:
    """Documents of each row counted from 0, where the balance loss is asked for over documents."""
    if segments is None or context.execution.aux_loss == "rows":
        return None
    starts = segments[:, 1:] != segments[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (1, 0)))
