"""The programs of prefill and decoding copy no weights of the model that was split for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemotron_jax as nj
from nemotron_jax.decoding import generate
from nemotron_jax.decoding.sampling import Sampling
from nemotron_jax.decoding.step import for_decoding
from tests.tiny_models import tiny_config

ROWS, TOKENS, WIDTH = 2, 16, 2048  # of so many channels that weights outweigh all else


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_prefill_nor_decoding_copies_the_model(dtype):
    config = dataclasses.replace(tiny_config("MEMEMEME"), width=WIDTH)
    build = lambda: nj.Nemotron(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    model = jax.eval_shape(lambda: for_decoding(build()))
    cache = jax.eval_shape(lambda: build().init_cache(ROWS, 2 * TOKENS))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    counts = array(np.int32, ROWS)
    chunk = generate._prefill_chunk.lower(
        model, cache, array(np.int32, ROWS, TOKENS), counts, array(jnp.dtype(dtype), ROWS, WIDTH)
    )
    decode = generate._decode.lower(
        model,
        cache,
        array(np.float32, ROWS, config.vocab_size),
        Sampling.create([0.0] * ROWS),
        stops=array(np.int32, 1),
        key=jax.eval_shape(lambda: jax.random.key(0)),
        limit=counts,
        real=array(bool, ROWS),
        capacity=TOKENS,
        speculative=0,
    )
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    for program in (chunk, decode):
        temporaries = program.compile().memory_analysis().temp_size_in_bytes
        assert temporaries < 0.3 * held  # unsplit, both take 0.9
