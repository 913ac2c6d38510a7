"""LatentMoE: routed at full width, computed in the latent, beside a shared expert at full width."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.experts import Experts, mix
from nemotron_jax.layers.linear import Linear
from nemotron_jax.layers.mlp import MLP
from nemotron_jax.layers.router import Router, balance_loss, choose
from nemotron_jax.sharding import cut_axis, gathered, local
from nemotron_jax.types import Context, Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterMetrics:
    """What one MoE layer reports of one call."""

    load: Float[Array, "E"]  # valid tokens sent to each expert
    aux_loss: Float[Array, ""]  # summed over sequences


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
        rows: Rows,
        state: None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], None, RouterMetrics]:
        latent = x if self.latent_down is None else self.latent_down(x, context, rows)
        mixed, load, aux_loss = self._routed(latent, self.router.logits(x), rows, context)
        routed = mixed if self.latent_up is None else self.latent_up(mixed, context, rows)
        shared, _, _ = self.shared(x, rows, state, context)
        metrics = RouterMetrics(jnp.sum(load, axis=0), jnp.sum(aux_loss))
        return routed + shared, None, metrics

    def _routed(
        self,
        latent: Float[Array, "B T L"],
        logits: Float[Array, "B T E"],
        rows: Rows,
        context: Context,
    ) -> tuple[Float[Array, "B T L"], Float[Array, "devices E"], Float[Array, "devices"]]:
        """Experts' outputs of each device's own tokens; load and balance loss of each device."""
        weights = self.experts.matrices()
        cuts = [cut_axis(weight) for weight in weights]

        def route(latent: Array, logits: Array, bias: Array, *others: Array | None) -> tuple:
            documents, valid, numbers, words, *parts = others
            own = Rows(documents=documents, valid=valid, numbers=numbers, words=words)
            flat = lambda array: array.reshape(-1, array.shape[-1])
            index, weights, scores = choose(flat(logits), bias, self.config)
            # The products gather the experts' own matrices, each as they need it.
            adapters = zip(parts[2:], cuts[2:], strict=True)
            matrices = (*parts[:2], *(gathered(*one, context.dtype) for one in adapters))
            options = {"num_experts": logits.shape[-1], "cuts": tuple(cuts[:2])}
            mixed, load = mix(flat(latent), index, weights, matrices, own, context, **options)
            loss = balance_loss(
                scores.reshape(logits.shape), self.config.experts_per_token, documents, valid
            )
            return mixed.reshape(latent.shape), load.astype(jnp.float32)[None], loss[None]

        by_row, bias = ("batch",), self.router.selection_bias[...]
        in_axes = (by_row, by_row, None, by_row, by_row, by_row, None, *weights)
        run = local(route, in_axes, (by_row, by_row, by_row))
        documents = None if context.execution.aux_loss == "rows" else rows.documents
        tokens = (documents, rows.valid, rows.numbers, rows.words)
        return run(latent, logits, bias, *tokens, *(weight.value for weight in weights))
