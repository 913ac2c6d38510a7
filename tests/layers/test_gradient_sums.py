"""Gradients of weights are added up in float32, over tokens and over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear
from nemotron_jax.sharding import make_mesh
from nemotron_jax.types import Context
from tests.tiny_models import random_tokens, tiny_model

BFLOAT16 = Execution(compute_dtype="bfloat16")


def test_devices_add_up_every_weight_s_gradient_in_float32():
    """Of a layer of each kind: convolution, scan, router, experts, and the embedding table."""
    loss = lambda model, tokens: jnp.sum(model(tokens, execution=BFLOAT16).hidden)
    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices())):
        lowered = jax.jit(jax.grad(loss)).lower(tiny_model("M*E-"), random_tokens(0, 2, 8))
    found = re.findall(
        r"stablehlo.all_reduce.*?replica_groups.*?tensor<(\w+)>.*?: \(tensor<([^>]*)>\)",
        lowered.as_text(),
        re.S,
    )
    sums = [kind for groups, kind in found if groups == "1x2xi64"]  # over both devices
    assert len(sums) >= 8 and all(kind.endswith("xf32") for kind in sums), sums


def test_a_bias_s_gradient_is_added_up_in_float32():
    """3,000 small gradients: a sum in bfloat16 has three digits at most."""
    linear = Linear("mlp_up", ("width", "mlp_hidden"), (4, 5), Init(nnx.Rngs(0), 1, 1), bias=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3000, 4)), jnp.bfloat16)
    scale = np.linspace(1, 2, 3000)[:, None].astype(jnp.bfloat16)
    loss = lambda linear: jnp.sum(linear(x, Context(BFLOAT16, jnp.bfloat16)) * scale)
    found = jax.grad(loss)(linear).bias[...]
    np.testing.assert_allclose(found, np.sum(scale.astype(np.float64)), rtol=1e-5)
