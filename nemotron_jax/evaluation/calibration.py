"""The largest inputs of a model's matrices on some text, for the scales of its activations."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.model.nemotron import Nemotron, number_documents
from nemotron_jax.model.stack import run_stack, split_layers
from nemotron_jax.quant.observe import observing
from nemotron_jax.sharding import target_platform
from nemotron_jax.types import Batch, Context, Rows

# A matmul's module within its layer on the hub. Experts of a layer share their inputs' scale.
_MODULES = {
    "mamba_in": "in_proj",
    "mamba_out": "out_proj",
    "attention_q": "q_proj",
    "attention_k": "k_proj",
    "attention_v": "v_proj",
    "attention_out": "o_proj",
    "latent_down": "fc1_latent_proj",
    "latent_up": "fc2_latent_proj",
    "expert_up": "experts.{}.up_proj",
    "expert_down": "experts.{}.down_proj",
    "shared_up": "shared_experts.up_proj",
    "shared_down": "shared_experts.down_proj",
    "mlp_up": "up_proj",
    "mlp_down": "down_proj",
}


def largest_inputs(model: Nemotron, batches: Sequence[Batch]) -> dict[str, float]:
    """The largest magnitude that each matrix of the trunk is given, by its module on the hub, the
    head's too. Rows are full: there is no padding."""
    names: list[str] = []
    run = jax.jit(functools.partial(_magnitudes, roles=names))
    found = [np.asarray(run(model, batch.tokens, batch.segment_ids)) for batch in batches]
    modules = _modules(model.config, names)
    largest = np.max(found, axis=0)
    return {m: float(value) for ms, value in zip(modules, largest, strict=True) for m in ms}


def _magnitudes(
    model: Nemotron, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], *, roles: list[str]
) -> Array:
    # Layer by layer and not by the model function, which is compiled apart from what is around it.
    context = Context(Execution(), model.embedding[...].dtype, target=target_platform())
    stacks = {letter: getattr(model, kind) for letter, kind in BLOCK_KINDS.items()}
    x = model.embedding[...][tokens]
    with observing() as seen:
        rows = Rows(number_documents(segments))
        hidden, _, _ = run_stack(x, model.config, split_layers(stacks), rows, None, context)
    roles[:] = [role for role, _ in seen]
    last = jnp.max(jnp.abs(model.final_norm(hidden))).astype(jnp.float32)
    return jnp.stack([*(value for _, value in seen), last])


def _modules(config: ModelConfig, roles: Sequence[str]) -> list[list[str]]:
    """The modules of each matmul in the order in which layers run, and the head's."""
    modules, layer, seen = [], -1, set()
    for role in roles:
        if layer < 0 or role in seen or not _belongs(role, config.pattern[layer]):
            layer, seen = layer + 1, set()
        seen.add(role)
        name, experts = _MODULES[role], [0]
        if "{}" in name:
            experts = range(config.moe.num_experts)
        modules.append([f"backbone.layers.{layer}.mixer.{name.format(e)}" for e in experts])
    return [*modules, ["lm_head"]]


def _belongs(role: str, letter: str) -> bool:
    kinds = {"M": ("mamba",), "*": ("attention",), "-": ("mlp",)}
    return role.startswith(kinds.get(letter, ("latent", "expert", "shared")))
