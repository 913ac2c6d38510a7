"""The sigmoid router: full-width, float32, balanced by a selection bias that never weights."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.model import MoEConfig
from nemotron_jax.layers.linear import normal


class SelectionBias(nnx.Variable):
    """Added to the scores for the choice of experts only.

    No gradient, decay or clipping reaches it: its type tells the optimizer so. The train step moves
    it.
    """


class Router(nnx.Module):
    """Chooses each token's experts and their weights."""

    def __init__(self, config: MoEConfig, width: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (width, config.num_experts)
        self.weight = nnx.Param(normal(rngs, shape, std, "float32"), axes=("width", "experts"))
        self.selection_bias = SelectionBias(
            jnp.zeros(config.num_experts, jnp.float32), axes=("experts",)
        )

    def __call__(
        self, x: Float[Array, "N D"]
    ) -> tuple[Int[Array, "N R"], Float[Array, "N R"], Float[Array, "N E"]]:
        """Chosen experts, their float32 weights, and the float32 scores of all experts."""
        config = self.config
        logits = jnp.dot(
            x.astype(jnp.float32),
            self.weight[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        scores = jax.nn.sigmoid(logits)
        choice = jax.lax.stop_gradient(scores + self.selection_bias[...])
        _, index = jax.lax.top_k(_within_best_groups(choice, config), config.experts_per_token)
        weights = jnp.take_along_axis(scores, index, axis=-1)
        if config.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return index, weights * config.weight_scale, scores


def balance_loss(
    scores: Float[Array, "B T E"],
    experts_per_token: int,
    sequences: Int[Array, "B T"] | None,
    valid: Bool[Array, "B T"] | None,
) -> Float[Array, ""]:
    """Sequence balance loss `E Σ_i f_i P_i`, averaged over the sequences that hold a token.

    `sequences` numbers each row's sequences from 0; None takes each row as one. f counts the best
    experts by the scores alone, not by the biased choice; P is the mean of the scores normalised
    over all experts. Source: Megatron-LM router.py, moe_utils.py (sequence auxiliary loss).
    """
    batch, num_tokens, num_experts = scores.shape
    per_row = 1 if sequences is None else num_tokens
    row = jnp.arange(batch)[:, None] * per_row
    sequence = jnp.broadcast_to(row if sequences is None else row + sequences, scores.shape[:2])
    weight = jnp.ones(scores.shape[:2]) if valid is None else valid.astype(jnp.float32)
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20) * weight[..., None]
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), experts_per_token)[1]

    table = jnp.zeros((batch * per_row, num_experts))
    hits = table.at[sequence[..., None], best].add(weight[..., None])
    probability = _sums(share, sequence, batch * per_row, whole_rows=sequences is None)
    tokens = _sums(weight, sequence, batch * per_row, whole_rows=sequences is None)
    loss = jnp.sum(hits * probability, axis=-1) / jnp.maximum(tokens, 1) ** 2
    return num_experts / experts_per_token * jnp.sum(loss) / jnp.maximum(jnp.sum(tokens > 0), 1)


def _sums(values: Array, sequence: Array, num_sequences: int, *, whole_rows: bool) -> Array:
    """Sum of values over the tokens of each sequence."""
    if whole_rows:
        return jnp.sum(values, axis=1)
    flat = values.reshape(-1, *values.shape[2:])
    return jax.ops.segment_sum(flat, sequence.reshape(-1), num_sequences)


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
