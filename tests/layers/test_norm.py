"""Norms: their own gradients are those of their definitions."""

import jax
import jax.numpy as jnp
import pytest

from nemotron_jax.layers import norm

EPSILON = 1e-5


def _defined(x, weight):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * weight


def _operands(count, dtype):
    keys = jax.random.split(jax.random.key(0), count + 2)
    rows = [(2.0 * jax.random.normal(key, (3, 5, 2, 16))).astype(dtype) for key in keys[:count]]
    return (
        *rows,
        1 + jax.random.normal(keys[-2], (2, 16)),
        jax.random.normal(keys[-1], (3, 5, 2, 16)),
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_definition(gated, dtype):
    """Of both norms, by every operand; with bfloat16 operands to the rounding of a result."""
    *operands, dout = _operands(2 if gated else 1, dtype)

    def ours(*operands):
        run = norm.gated_rms_norm if gated else norm.rms_norm
        out = run(*operands, EPSILON)
        assert out.dtype == dtype
        return out.astype(jnp.float32)

    def defined(*operands):
        *rows, weight = (operand.astype(jnp.float32) for operand in operands)
        return _defined(rows[0] * jax.nn.silu(rows[1]) if gated else rows[0], weight)

    @jax.jit
    def both(*operands):
        return [
            (lambda out, pull: (out, *pull(dout)))(*jax.vjp(f, *operands)) for f in (ours, defined)
        ]

    bound = 1e-6 if dtype == "float32" else 2**-7
    for found, wanted in zip(*both(*operands), strict=True):
        assert found.dtype == wanted.dtype or found.dtype == jnp.float32
        error = jnp.linalg.norm((found - wanted).astype(jnp.float32))
        assert error <= bound * jnp.linalg.norm(wanted.astype(jnp.float32))
