"""Multi-token prediction: one physical block that serves every depth."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.latent_moe import KEPT, RouterMetrics
from nemotron_jax.layers.linear import Linear
from nemotron_jax.layers.norm import RMSNorm
from nemotron_jax.model.block import Block
from nemotron_jax.types import Context, Rows


class MTPBlock(nnx.Module):
    """From the hidden state at t and the embedding of a later token, the hidden state that predicts
    the next.

    The embedding comes first in the concatenation; both halves have norms of their own. Embedding
    table and output head belong to the main model and stay there.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: str) -> None:
        width = config.width
        self.embedding_norm = RMSNorm(width, config.norm_epsilon)
        self.hidden_norm = RMSNorm(width, config.norm_epsilon)
        self.project = Linear(
            "mtp_in",
            ("mtp_width", "width"),
            (2 * width, width),
            Init(rngs, config.init_std, config.init_std, dtype),
        )
        kinds = [BLOCK_KINDS[letter] for letter in config.mtp.pattern]
        self.blocks = nnx.List([Block(config, kind, rngs=rngs, dtype=dtype) for kind in kinds])
        self.final_norm = RMSNorm(width, config.norm_epsilon)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        rows: Rows,
        states: tuple | None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], tuple | None, list[RouterMetrics]]:
        halves = [self.embedding_norm(embedded), self.hidden_norm(hidden.astype(embedded.dtype))]
        x = self.project(jnp.concatenate(halves, axis=-1), context)
        new_states, metrics = [], []
        # These blocks are in no stack, so the trunk's scan and its rematerialisation pass them by.
        remat = states is None and context.execution.remat != "none"
        for number, block in enumerate(self.blocks):
            state = None if states is None else states[number]
            run = lambda x, block=block, state=state: block(x, rows, state, context)
            x, state, report = (jax.checkpoint(run, policy=KEPT) if remat else run)(x)
            new_states.append(state)
            if report is not None:
                metrics.append(report)
        return self.final_norm(x), None if states is None else tuple(new_states), metrics
