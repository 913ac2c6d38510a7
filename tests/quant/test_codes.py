"""Codes that are made once are the operands that products make of the masters each time."""

import jax
import jax.numpy as jnp
import numpy as np

from nemotron_jax.config.precision import NVFP4, NVFP4Config, PrecisionConfig, nemotron3_nvfp4
from nemotron_jax.quant.codes import is_kept, quantized_once
from nemotron_jax.quant.emulated import Spec, _weight_operands, expert_operand
from nemotron_jax.quant.operands import DGRAD, FPROP

SPEC = Spec("expert_up", NVFP4, NVFP4Config(), (jnp.dtype(jnp.float32),))


def test_operands_of_codes_are_those_of_the_masters_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(
        rng.standard_normal(shape) * 3.0 ** rng.integers(-5, 3, shape)
    )
    stack = draw(2, 3, 32, 48).astype(jnp.float32)  # layers of experts
    (codes,) = jax.jit(lambda w: quantized_once([w], 2))(stack)
    for layer in range(2):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], codes)
        for product in (FPROP, DGRAD):
            wanted = expert_operand(SPEC, stack[layer], product)
            for found, expected in zip(expert_operand(SPEC, stack[layer], product, one), wanted):
                np.testing.assert_array_equal(found, expected)
    together = [draw(40, 24).astype(jnp.float32), draw(40, 7).astype(jnp.float32)]  # padded sides
    codes = tuple(quantized_once(together, 0))
    assert codes[0].amax == codes[1].amax
    expected = _weight_operands(SPEC, tuple(together), FPROP, (None, None))
    for found, (operand, scale) in zip(_weight_operands(SPEC, together, DGRAD, codes), expected):
        np.testing.assert_array_equal(found[0], operand)
        assert found[1] == scale


def test_codes_take_half_a_byte_a_weight() -> None:
    weight = jax.ShapeDtypeStruct((4, 256, 512), jnp.float32)
    (codes,) = jax.eval_shape(lambda w: quantized_once([w], 1), weight)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
    assert size <= 0.505 * weight.size


def test_only_square_blocks_serve_both_products() -> None:
    recipe = nemotron3_nvfp4(0)
    assert is_kept("expert_up", recipe) and is_kept("mamba_in", recipe)
    assert not is_kept("mamba_out", recipe) and not is_kept("attention_q", recipe)
    rows = PrecisionConfig(nvfp4_roles=("expert_up",), nvfp4=NVFP4Config(weight_block="1x16"))
    assert not is_kept("expert_up", rows)
