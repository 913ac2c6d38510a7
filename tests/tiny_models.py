"""Tiny random models for tests of laws: every parameter far from where training starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import nemotron_jax as nj
from nemotron_jax.config.model import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from nemotron_jax.model.parameters import abstract_model, flatten, unflatten

VOCABULARY = 53

# Compiling without optimisation takes half as long, and programs this small run as fast.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny_config(pattern: str, mtp: str | None = None) -> ModelConfig:
    """A model of width 24 with odd sizes; only the parts that the patterns name."""
    used = set(pattern) | set(mtp or "")
    mamba = MambaConfig(num_heads=4, head_dim=6, state_size=5, num_groups=2, chunk=8)
    moe = MoEConfig(
        num_experts=6,
        experts_per_token=2,
        expert_width=10,
        shared_width=14,
        latent_width=12,
        weight_scale=2.5,
    )
    return ModelConfig(
        vocab_size=VOCABULARY,
        width=24,
        pattern=pattern,
        mamba=mamba if "M" in used else None,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=5) if "*" in used else None,
        moe=moe if "E" in used else None,
        mlp=MLPConfig(width=20) if "-" in used else None,
        mtp=MTPConfig(mtp) if mtp else None,
    )


@functools.cache
def tiny_model(pattern: str, mtp: str | None = None, seed: int = 0) -> nj.Nemotron:
    """Random parameters, drawn by numpy so that nothing is compiled."""
    return randomised(abstract_model(tiny_config(pattern, mtp)), seed)


def randomised(like: nj.Nemotron, seed: int) -> nj.Nemotron:
    """`like` with every parameter drawn at random, biases and gains included."""
    generator = np.random.default_rng(seed)
    draws = {name: _draw(name, leaf.shape, generator) for name, leaf in flatten(like).items()}
    return unflatten(like, {name: jnp.asarray(a, jnp.float32) for name, a in draws.items()})


def random_tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(3, VOCABULARY, shape), jnp.int32)


def _draw(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if name.endswith("A_log"):
        return generator.uniform(0, np.log(16), shape)
    if name.endswith("dt_bias"):
        return generator.uniform(-3, -0.5, shape)  # steps of 0.05 to 0.5
    noise = generator.standard_normal(shape)
    if name.endswith(("norm.weight", ".D")):
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    return noise if name == "embedding" else noise / np.sqrt(shape[-2])
