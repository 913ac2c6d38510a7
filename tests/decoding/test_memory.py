"""The programs of prefill and decoding copy no weights of the model that was split for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemotron_jax as nj
from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding import lockstep, reading
from nemotron_jax.decoding.loop import Sizes
from nemotron_jax.decoding.rules import Asked, Free
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.store import FlatModel
from tests.tiny_models import tiny_config

ROWS, TOKENS, WIDTH = 2, 16, 2048  # of so many channels that weights outweigh all else


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_prefill_nor_decoding_copies_the_model(dtype):
    config = dataclasses.replace(tiny_config("MEMEMEME"), width=WIDTH)
    build = lambda: nj.Nemotron(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    model = jax.eval_shape(lambda: for_decoding(build()))
    weights, execution = FlatModel.of(model), Execution()
    cache = jax.eval_shape(lambda: build().init_cache(ROWS, 2 * TOKENS))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    counts, hidden = array(np.int32, ROWS), array(jnp.dtype(dtype), ROWS, WIDTH)
    tokens = array(np.int32, ROWS, TOKENS)
    chunk = reading._read_chunk.lower(weights, cache, tokens, counts, hidden, execution=execution)
    flags = array(bool, ROWS)
    asked = Asked.of({}, ROWS, Free(config.vocab_size))
    rows = lockstep._DecodeRows(hidden, counts, flags, flags, asked)
    sizes = Sizes(TOKENS, 0)
    decode = lockstep._decode.lower(weights, cache, rows, 1, sizes=sizes, execution=execution)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    for program in (chunk, decode):
        temporaries = program.compile().memory_analysis().temp_size_in_bytes
        assert temporaries < 0.3 * held  # unsplit, both take 0.9
