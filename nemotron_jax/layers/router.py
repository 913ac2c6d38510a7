"""The sigmoid router: full-width, float32, balanced by a selection bias that never weights."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.sharding.weights import gather_parameter


class SelectionBias(nnx.Variable):
    """Added to the scores for the choice of experts only.

    No gradient, decay or clipping reaches it: its type tells the optimizer so. The train step moves
    it.
    """


class RouterWeight(nnx.Param):
    """What scores the experts: its type tells the optimizer what a run of frozen routers leaves."""


class Router(nnx.Module):
    """Chooses each token's experts and their weights."""

    def __init__(self, config: MoEConfig, width: int, init: Init) -> None:
        self.config = config
        drawn = init.normal(width, config.num_experts, dtype="float32")
        self.weight = RouterWeight(drawn, axes=("width", "router_experts"))
        self.selection_bias = SelectionBias(
            jnp.zeros(config.num_experts, jnp.float32), axes=("router_experts",)
        )

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """float32 logits of every expert, at the model's full width."""
        # In bfloat16 logits near one another would tie, and rounding would choose the expert.
        weight = gather_parameter(self.weight[...].astype(jnp.float32), self.weight.axes)
        return jnp.dot(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)


def choose(
    logits: Float[Array, "N E"], bias: Float[Array, "E"], config: MoEConfig
) -> tuple[Int[Array, "N R"], Float[Array, "N R"], Float[Array, "N E"]]:
    """Chosen experts, their float32 weights, and the float32 scores of all experts; `bias` counts
    for the choice alone."""
    scores = jax.nn.sigmoid(logits)
    # The bias moves by load, outside of the loss; weights are the scores without it.
    choice = jax.lax.stop_gradient(scores + bias)
    _, index = jax.lax.top_k(_within_best_groups(choice, config), config.experts_per_token)
    weights = _take_chosen(scores, index)
    if config.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return index, weights * config.weight_scale, scores


def balance_loss(
    scores: Float[Array, "B T E"],
    experts_per_token: int,
    documents: Int[Array, "B T"] | None,
    valid: Bool[Array, "B T"] | None,
) -> Float[Array, ""]:
    """Sequence balance losses `E Σ_i f_i P_i`, summed over the sequences that hold a valid token.

    `documents` numbers each row's sequences from 0; None takes each row as one. f counts the best
    experts by the scores alone, not by the biased choice; P is the mean of the scores normalised
    over all experts. `count_sequences` makes the sum a mean. Source: Megatron-LM router.py,
    moe_utils.py (sequence auxiliary loss).
    """
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), experts_per_token)[1]
    # f counts hits and has no gradient: the loss moves scores through P alone.
    weight = jnp.ones(scores.shape[:2]) if valid is None else valid.astype(jnp.float32)
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20) * weight[..., None]
    if documents is None:
        each = jax.vmap(_row_loss)(share, best, weight)
    else:  # row by row: a table of all rows' documents would be as large as the scores
        each = jax.lax.map(lambda row: _documents_loss(*row), (share, best, weight, documents))
    return scores.shape[-1] / experts_per_token * jnp.sum(each)


def count_sequences(
    documents: Int[Array, "B T"] | None, valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """How many sequences hold a valid token: documents, or rows where `documents` is None."""
    if documents is None:
        return jnp.sum(jnp.any(valid, axis=1)).astype(jnp.float32)
    # Documents are numbered in order, so each one's first valid token has a new number.
    latest = jax.lax.cummax(jnp.where(valid, documents, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.sum(valid & (documents > before)).astype(jnp.float32)


def _row_loss(
    share: Float[Array, "T E"], best: Int[Array, "T R"], weight: Float[Array, "T"]
) -> Float[Array, ""]:
    hits = jnp.sum(_is_chosen(best, share.shape[-1]) * weight[:, None, None], axis=(0, 1))
    tokens = jnp.maximum(jnp.sum(weight), 1)
    return jnp.sum(hits * jnp.sum(share, axis=0)) / tokens**2


def _documents_loss(
    share: Float[Array, "T E"],
    best: Int[Array, "T R"],
    weight: Float[Array, "T"],
    documents: Int[Array, "T"],
) -> Float[Array, ""]:
    length, experts = share.shape
    hits = jnp.zeros((length, experts)).at[documents[:, None], best].add(weight[:, None])
    probability = jax.ops.segment_sum(share, documents, length)
    tokens = jnp.maximum(jax.ops.segment_sum(weight, documents, length), 1)
    return jnp.sum(jnp.sum(hits * probability, axis=-1) / tokens**2)


@jax.custom_vjp
def _take_chosen(scores: Float[Array, "N E"], index: Int[Array, "N R"]) -> Float[Array, "N R"]:
    """Each token's scores of its experts, and its gradient, by comparing with every expert.

    The scatter that is the gradient of a gather takes a TPU's compiler thirteen seconds.
    """
    return jnp.sum(jnp.where(_is_chosen(index, scores.shape[-1]), scores[:, None], 0), axis=-1)


def _take_chosen_forward(scores: Array, index: Array) -> tuple:
    return _take_chosen(scores, index), (index, scores)


def _take_chosen_backward(residuals: tuple, cotangent: Array) -> tuple:
    index, scores = residuals
    chosen = _is_chosen(index, scores.shape[-1])
    return jnp.sum(jnp.where(chosen, cotangent[..., None], 0), axis=1), None


_take_chosen.defvjp(_take_chosen_forward, _take_chosen_backward)


def _is_chosen(index: Int[Array, "N R"], experts: int) -> Bool[Array, "N R E"]:
    """Never made whole: what reads it compares anew."""
    return index[..., None] == jnp.arange(experts, dtype=index.dtype)


def _within_best_groups(choice: Float[Array, "N E"], config: MoEConfig) -> Float[Array, "N E"]:
    """-inf outside the groups whose two best experts sum highest."""
    if config.groups_per_token == config.num_expert_groups:
        return choice
    groups = choice.reshape(
        -1, config.num_expert_groups, config.num_experts // config.num_expert_groups
    )
    strength = jnp.sum(jax.lax.top_k(groups, min(2, groups.shape[-1]))[0], axis=-1)
    kept = jax.lax.top_k(strength, config.groups_per_token)[1]
    mask = jnp.any(jnp.arange(config.num_expert_groups) == kept[..., None], axis=-2)
    return jnp.where(mask[..., None], groups, -jnp.inf).reshape(choice.shape)
