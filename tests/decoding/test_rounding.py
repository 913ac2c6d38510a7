"""States in 16 bits: right on average, and as good after 16K tokens as after a few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.decoding.rounding import keep_states, stochastic_float16
from nemotron_jax.layers.mamba2 import MambaState
from nemotron_jax.model.cache import Cache
from pallas_kernels import ssd_step
from tests.tiny_models import quick_jit

TOKENS = 16_384
# Each rounding is off by 0.4 units in the last place on average, up to 2**-11.3 of a number; the
# errors of a memory of 20,000 tokens add up like a random walk, to sqrt(20000 / 2) times that, 4 %,
# and an output sums 8 numbers, whose errors cancel in part.
BOUND = 0.03


def test_the_mean_is_the_number_and_the_result_a_neighbour():
    generator = np.random.default_rng(0)
    exponents = generator.uniform(-26, 15, 64)
    numbers = (generator.choice((-1, 1), 64) * 2.0**exponents).astype(np.float32)
    uniform = (np.arange(4096) + 0.5) / 4096
    found = np.asarray(
        quick_jit(stochastic_float16)(
            jnp.broadcast_to(numbers, (4096, 64)),
            jnp.broadcast_to(jnp.float32(uniform)[:, None], (4096, 64)),
        ),
        np.float64,
    )
    step = np.maximum(np.spacing(np.abs(numbers).astype(np.float16)).astype(np.float64), 2.0**-24)
    assert (np.abs(found - numbers) <= step).all()
    assert (np.abs(found.mean(0) - numbers) < 2e-3 * step).all()
    exact = np.float32([0.0, 1.0, -2.5, 2.0**-24, 65504.0])
    kept = stochastic_float16(jnp.asarray(exact), jnp.full(5, 0.999, jnp.float32))
    np.testing.assert_array_equal(np.asarray(kept, np.float32), exact)
    assert float(stochastic_float16(jnp.float32(1e6), jnp.float32(0.5))) == 65504


@pytest.fixture(scope="module")
def drift():
    """Relative error of the last 1,024 outputs, by how the state is kept."""
    heads, channels, size = 4, 2, 8
    keys = jax.random.split(jax.random.key(0), 4)
    x = 1 + 0.5 * jax.random.normal(keys[0], (1, TOKENS, heads, channels))
    B, C = (jax.random.uniform(key, (1, TOKENS, 1, size), minval=0.1) for key in keys[1:3])
    dt = jnp.full((1, TOKENS, heads), 0.01)
    A, D = -jnp.array([0.005, 0.02, 0.2, 1.0]), jnp.zeros(heads)  # 20,000 to 100 tokens of memory

    def outputs(dtype, rounding):
        def step(carry, token):
            ssm, length = carry
            y, after = ssd_step(*token[:2], A, *token[2:], D, ssm, every_state=False)
            like = Cache((MambaState(ssm, ssm, ssm, ssm),), length)
            cache = Cache((MambaState(after, after, after, after),), length + 1)
            kept = keep_states(cache, like, rounding)
            return (kept.layers[0].ssm, kept.length), y

        pieces = [jnp.moveaxis(a, 1, 0)[:, :, None] for a in (x, dt, B, C)]
        start = jnp.zeros((1, heads, channels, size), dtype), jnp.zeros(1, jnp.int32)
        return jax.lax.scan(step, start, pieces)[1][-1024:]

    def errors() -> dict:
        exact = outputs(jnp.float32, "nearest")
        square = lambda y: jnp.mean(y**2, axis=(0, 1, 2, 4))  # of each head
        error = lambda y: jnp.sqrt(square(y - exact) / square(exact))
        return {way: error(outputs(jnp.float16, way)) for way in ("stochastic", "nearest")}

    return jax.device_get(quick_jit(errors)())


def test_float16_drifts_over_16k_tokens_unless_rounded_stochastically(drift):
    assert drift["stochastic"].max() < BOUND
    assert drift["nearest"].max() > 5 * BOUND, "nothing to guard against"
