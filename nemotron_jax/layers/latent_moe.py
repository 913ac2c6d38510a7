"""LatentMoE: routed at full width, computed in the latent, beside a shared expert at full width."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.exchange import Exchange
from nemotron_jax.layers.experts import Experts, mix
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear
from nemotron_jax.layers.mlp import MLP
from nemotron_jax.layers.router import Router, balance_loss, choose
from nemotron_jax.sharding import local
from nemotron_jax.sharding.weights import Cuts, cuts_of, first_expert, gathered
from nemotron_jax.types import Context, Packed, Rows, Weight

MIXED = "mixed"
# What rematerialised blocks keep: 2 KB a token of Super. The gradient of the experts makes what it
# needs of their rows itself, so without it all would be made, and exchanged, once more for
# `latent_up`'s gradient alone.
KEPT = jax.checkpoint_policies.save_only_these_names(MIXED)


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
        init: Init,
    ) -> None:
        self.config = config
        latent = width if config.latent_width is None else config.latent_width
        bias = config.projection_bias
        self.router = Router(config, width, init)
        if config.latent_width is None:
            self.latent_down = self.latent_up = None
        else:
            self.latent_down = Linear(
                "latent_down", ("width", "latent"), (width, latent), init, bias=bias
            )
            self.latent_up = Linear(
                "latent_up", ("latent", "width"), (latent, width), init.out, bias=bias
            )
        self.experts = Experts(config, latent, init)
        self.shared = MLP("shared", width, config.shared_width, init, bias=bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        state: None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], None, RouterMetrics]:
        latent = x if self.latent_down is None else self.latent_down(x, context, rows)
        mixed, load, aux_loss = self._routed(latent, self.router.logits(x), rows, context)
        mixed = checkpoint_name(mixed, MIXED)
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
        matrices = self.experts.matrices()
        cuts = tuple(cuts_of(matrix) for matrix in matrices)
        matrices = tuple(map(_with_fitting_codes, matrices, cuts))
        owned = Owned(
            cuts,
            Exchange.of(matrices[0], latent.shape[0]),
            self.config,
            context,
        )
        by_row = ("batch",)
        in_axes = (by_row, by_row, None, Rows, Weight)
        run = local(owned.route, in_axes, (by_row, by_row, by_row))
        if context.execution.aux_loss == "rows":
            rows = dataclasses.replace(rows, documents=None)
        return run(latent, logits, self.router.selection_bias[...], rows, matrices)


@dataclasses.dataclass(frozen=True)
class Owned:
    """One device's part in a layer: the experts that it owns, and the tokens that reach them."""

    cuts: tuple[Cuts, ...]  # of each matrix of the experts
    exchange: Exchange
    config: MoEConfig
    context: Context

    def route(
        self,
        latent: Float[Array, "B T L"],
        logits: Float[Array, "B T E"],
        bias: Float[Array, "E"],
        rows: Rows,
        matrices: tuple[Weight | Packed, ...],
    ) -> tuple[Float[Array, "B T L"], Float[Array, "1 E"], Float[Array, "1"]]:
        """The layer inside `local`: this device's tokens choose among all experts, and get the sum
        of what their owners make of them."""
        flat = lambda array: array.reshape(-1, array.shape[-1])
        index, weights, scores = choose(flat(logits), bias, self.config)
        scores = scores.reshape(logits.shape)
        loss = balance_loss(scores, self.config.experts_per_token, rows.documents, rows.valid)
        mixed, load = self.mixed(flat(latent), index, weights, rows, matrices)
        return mixed.reshape(latent.shape), load.astype(jnp.float32)[None], loss[None]

    def mixed(
        self,
        x: Float[Array, "N L"],
        index: Int[Array, "N R"],
        weights: Float[Array, "N R"],
        rows: Rows,
        matrices: tuple[Weight | Packed, ...],
    ) -> tuple[Float[Array, "N L"], Int[Array, "E"]]:
        """The experts' weighted sums for this device's tokens, and how many tokens each of its own
        experts got of all devices'; others' are zeros."""
        exchange, num_experts = self.exchange, self.config.num_experts
        count = num_experts // exchange.devices
        first = first_expert(exchange.owners, count)
        up, down, *adapters = (
            matrix if isinstance(matrix, Packed) else matrix.value for matrix in matrices
        )
        codes = [matrix.codes if isinstance(matrix, Weight) else None for matrix in matrices]
        # Up's and down's products gather them, each as it needs them.
        of_adapters = zip(adapters, self.cuts[2:], strict=True)
        adapters = [gathered(part, cuts, self.context.dtype) for part, cuts in of_adapters]
        flat = lambda array: None if array is None else exchange.to_owners(array.reshape(-1))
        own, load = mix(
            exchange.to_owners(x),
            exchange.to_owners(index) - first,
            exchange.to_owners(weights),
            (up, down, *adapters),
            Rows(valid=flat(rows.valid), numbers=flat(rows.numbers), words=rows.words),
            self.context,
            num_experts=count,
            devices=exchange.devices,
            cuts=self.cuts[:2],
            codes=tuple(codes[:2]),
        )
        return exchange.from_owners(own, x.dtype), exchange.among_all(load, num_experts)


def _with_fitting_codes(matrix: Weight | Packed, cuts: Cuts) -> Weight | Packed:
    """The matrix without its codes where devices share more than whole experts: then it is
    quantised where it is whole."""
    cut_within = any(axis > 0 for axis, _ in (*cuts.gathered, *cuts.kept))
    if isinstance(matrix, Weight) and cut_within:
        return dataclasses.replace(matrix, codes=None)
    return matrix
