"""Pages are read where they lie: what compiled programs hold, and NaN that is left in pages."""

import dataclasses
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.decoding import store
from nemotron_jax.decoding.loop import Sizes
from nemotron_jax.decoding.rules import Asked, Free
from nemotron_jax.decoding.store import DecodeRows, FlatModel, PrefillRows, Store
from nemotron_jax.layers import attention as layer
from nemotron_jax.layers.attention import PagedKV
from nemotron_jax.model.parameters import flatten, unflatten
from tests.decoding import engines
from tests.decoding.engines import alone, assert_alone, make, quick_programs, submit  # noqa: F401
from tests.tiny_models import quick_jit

ROWS, WIDTH, PAGE = 2, 512, 64  # so wide that no block of scores is as large


@pytest.mark.more
def test_nan_of_old_weights_is_met_by_no_later_request() -> None:
    """Weights of NaN, one long request, good weights, then a short one that takes its pages."""
    good = engines.old_model()
    bad = unflatten(good, {name: a * jnp.nan for name, a in flatten(good).items()})
    for speculative in (0, 2):
        engine = make(good, speculative, pages=5)
        engine.replace_weights(bad, "bad")
        submit(engine, engines.PROMPTS[0], max_new_tokens=20)
        engine.run()
        engine.replace_weights(good, "good")
        request = submit(engine, engines.PROMPTS[1], max_new_tokens=8)
        engine.run()
        assert_alone(request, alone(1, 0, speculative))


def lowered(name: str, number: int) -> str:
    """The optimised text of one of the engine's programs, for a table that is wide."""
    model, drafts = engines.old_model(), number if name == "decode" else 0
    config = nj.EngineConfig(
        slots=ROWS, max_length=WIDTH * PAGE, page_tokens=PAGE, speculative=drafts
    )
    kept = dataclasses.replace(Store.create(model, config), snapshots=None)
    integers = lambda *shape: np.zeros(shape, np.int32)
    table, each = integers(ROWS, WIDTH), integers(ROWS)
    options = {"execution": nj.Execution()}
    if name == "decode":
        flags, asked = np.zeros(ROWS, bool), Asked.of({}, ROWS, Free(model.config.vocab_size))
        rows = DecodeRows(each, table, each, each, flags, flags, asked), np.int32(4)
        options["sizes"] = Sizes(config.capacity(drafts), drafts)
    else:
        rows = (PrefillRows(each, table, each, integers(ROWS, number), each),)
    program = quick_jit(inspect.unwrap(getattr(store, name)), static_argnames=tuple(options))
    return program.lower(FlatModel.of(model), kept, *rows, **options).compile().as_text()


def largest(text: str) -> int:
    """Numbers of the largest array of a program that is no pool."""
    model = engines.old_model().config.attention
    pool = [ROWS * WIDTH + 1, PAGE, 2 * model.num_kv_heads, model.head_dim]
    shapes = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    sizes = [[int(n) for n in shape.split(",")] for shape in set(shapes)]
    return max(math.prod(size) for size in sizes if sorted(size) != sorted(pool))


PROGRAMS = [("decode", 0), ("decode", 3), ("prefill", 8), ("prefill", 128)]


@pytest.mark.more
@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_no_program_holds_a_dense_copy_of_a_rows_pages(name: str, number: int) -> None:
    """Drafts of a decode program, tokens of a prefill: each form that attention over pages has."""
    config = engines.old_model().config.attention
    row = WIDTH * PAGE * config.num_kv_heads * config.head_dim
    assert largest(lowered(name, number)) < row


@pytest.mark.more
def test_a_copy_is_seen(monkeypatch) -> None:
    def attend(state: PagedKV, q: jax.Array, rows: layer.Rows, context: layer.Context) -> jax.Array:
        both = state.pool[state.table].reshape(len(q), state.capacity, -1, 2, q.shape[3])
        masks = (None, rows.lengths, rows.offset)
        return layer._attend(q, both[..., 0, :], both[..., 1, :], masks, context)

    monkeypatch.setattr(PagedKV, "attend", attend)
    jax.clear_caches()  # of what was traced with the state's own
    config = engines.old_model().config.attention
    row = WIDTH * PAGE * config.num_kv_heads * config.head_dim
    assert largest(lowered("decode", 0)) >= ROWS * row
