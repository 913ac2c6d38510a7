"""The TPU's grouped products, interpreted, equal the definition for any cut of rows into groups.

One shape is traced and the group sizes are data, so every pattern costs a run and no compilation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import lanes, pallas_tpu, pieces, reference, specs, visits
from pallas_kernels.testing import assert_close

ROWS, DEPTH, WIDTH, EXPERTS = 333, 24, 33, 6
# Tiles of 128 rows and pieces of 64, so that few rows still make several of both.
PATTERNS = {
    "shorter and longer than a tile": (1, 200, 7, 64, 0, 61),
    "empty first, middle and last": (0, 130, 0, 200, 3, 0),
    "a rest that would leave its tile": (20, 200, 0, 60, 0, 5),
    "all in one": (0, 0, 333, 0, 0, 0),
    "rows past the sum": (11, 0, 30, 90, 1, 2),
    "ends at tiles": (128, 0, 128, 0, 0, 77),
    "no rows": (0, 0, 0, 0, 0, 0),
    "sizes past the rows": (100, 100, 100, 100, 0, 5),
}
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}  # bfloat16: one rounding of the sum, 2^-9


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILE_ROWS", (128,))
    monkeypatch.setattr(pieces, "LARGE", 64)


def operands(dtype, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return normal(ROWS, DEPTH), normal(EXPERTS, DEPTH, WIDTH), normal(ROWS, WIDTH)


def cut(sizes):
    """Sizes as the definition wants them: those past the rows cut off."""
    ends = np.minimum(np.cumsum(sizes), ROWS)
    return jnp.asarray(np.diff(ends, prepend=0), jnp.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_products_and_both_gradients_equal_the_definition(dtype):
    lhs, rhs, dout = operands(dtype)

    @jax.jit
    def kernels(sizes):
        product = functools.partial(pallas_tpu.matmul, interpret=True)
        out = product(lhs, rhs, sizes, transpose_rhs=False)
        dlhs = product(dout, rhs, sizes, transpose_rhs=True)
        return out, dlhs, pallas_tpu.outer(lhs, dout, sizes, interpret=True)

    for name, sizes in PATTERNS.items():
        out, dlhs, drhs = kernels(jnp.asarray(sizes, jnp.int32))
        expected = reference.grouped_matmul(lhs, rhs, cut(sizes))
        assert_close(out, expected, TOLERANCE[dtype], f"{name}: out")
        expected = reference.grouped_matmul(dout, rhs.swapaxes(1, 2), cut(sizes))
        assert_close(dlhs, expected, TOLERANCE[dtype], f"{name}: gradient of lhs")
        expected = reference.grouped_outer(lhs, dout, cut(sizes))
        assert_close(drhs, expected, 1e-5, f"{name}: gradient of rhs")
        assert not np.any(np.asarray(drhs)[np.asarray(cut(sizes)) == 0])


@pytest.mark.parametrize("size", [128, DEPTH], ids=["as given", "turned"])
def test_the_mlp_and_its_gradients_equal_the_definition(size, monkeypatch):
    monkeypatch.setattr(lanes, "LANES", size)
    lhs, up, _ = operands(jnp.float32)
    down, dout = up.swapaxes(1, 2) / 5, operands(jnp.float32, 1)[0]
    sizes = jnp.asarray(PATTERNS["shorter and longer than a tile"], jnp.int32)
    out = jax.jit(functools.partial(pallas_tpu.mlp, interpret=True))(lhs, up, down, sizes)
    mlp = functools.partial(reference.grouped_mlp, group_sizes=sizes)
    expected, pullback = jax.vjp(mlp, lhs, up, down)
    assert_close(out, expected, 1e-5, "output")
    gradients = jax.jit(functools.partial(pallas_tpu.mlp_gradients, interpret=True))
    for name, actual, wanted in zip(
        ("lhs", "up", "down"), gradients(lhs, up, down, sizes, dout), pullback(dout), strict=True
    ):
        assert_close(actual, wanted, 1e-5, f"gradient of {name}")


def test_each_expert_has_a_scale_and_foreign_infinities_stay_out():
    lhs, rhs, dout = operands(jnp.float32)
    sizes = jnp.asarray(PATTERNS["rows past the sum"], jnp.int32)
    lhs, dout = lhs.at[11:41].set(jnp.inf), dout.at[200:].set(jnp.nan)  # one group; past all
    scale = jnp.asarray([2.0, 3, 5, 7, 11, 13])
    options = {"scale": scale, "interpret": True}
    product = functools.partial(pallas_tpu.matmul, transpose_rhs=False, **options)
    out = jax.jit(product)(lhs, rhs, sizes)
    drhs = jax.jit(functools.partial(pallas_tpu.outer, **options))(lhs, dout, sizes)
    finite = lhs.at[11:41].set(0)
    expected = reference.grouped_matmul(finite, rhs * scale[:, None, None], sizes)
    keep = np.r_[0:11, 41:ROWS]
    assert_close(out[keep], expected[keep], 1e-5, "output")
    expected = reference.grouped_outer(finite, dout.at[200:].set(0), sizes)
    expected *= scale[:, None, None]
    others = np.array([0, 1, 3, 4, 5])
    assert_close(drhs[others], expected[others], 1e-5, "gradient of rhs")


@pytest.mark.parametrize("seed", range(3))
def test_visits_hold_every_row_once_and_open_every_block_once(seed):
    rng = np.random.default_rng(seed)
    experts, rows, height = int(rng.integers(1, 40)), int(rng.integers(1, 900)), 64
    sizes = np.bincount(rng.integers(0, experts, int(rng.integers(0, rows + 1))), minlength=experts)
    owner = np.append(np.repeat(np.arange(experts), sizes), np.full(rows - sizes.sum(), -1))
    for build, blocks in ((visits.by_tile, -(-rows // height)), (visits.by_expert, experts)):
        table = jax.jit(build, static_argnums=(1, 2))(jnp.asarray(sizes, jnp.int32), rows, height)
        expert, tile, low, high, first = map(np.asarray, table.tables())
        found = np.full(rows, -1)
        for i in np.flatnonzero(high > low):
            place = slice(tile[i] * height + low[i], tile[i] * height + high[i])
            assert (found[place] == -1).all()
            found[place] = expert[i]
        np.testing.assert_array_equal(found, owner)
        opened = (tile if build is visits.by_tile else expert)[first == 1]
        np.testing.assert_array_equal(np.sort(opened), np.arange(blocks))
        bound = expert.size // table.cores
        busy = (high > low).reshape(table.cores, bound).nonzero()[1]
        assert int(table.steps) <= bound and (busy < int(table.steps)).all()


def test_a_kernel_that_ignores_where_a_group_ends_is_caught(monkeypatch):
    everything = lambda start, height, low, high: jnp.ones((height, 1), bool)
    monkeypatch.setattr(pieces, "row_mask", everything)
    lhs, rhs, _ = operands(jnp.float32)
    sizes = jnp.asarray(PATTERNS["rows past the sum"], jnp.int32)
    out = pallas_tpu.matmul(lhs, rhs, sizes, transpose_rhs=False, interpret=True)
    with pytest.raises(AssertionError, match="out"):
        assert_close(out, reference.grouped_matmul(lhs, rhs, sizes), 1e-5, "out")


@pytest.mark.parametrize("name", ["super", "nano"])
def test_published_experts_run_in_bfloat16_beside_masters_in_float32(name):
    routing, shape = specs.SHAPES[name], jax.ShapeDtypeStruct
    rows = shape((routing.tokens * routing.choices, routing.latent), jnp.bfloat16)
    up = shape((routing.experts, routing.latent, routing.hidden), jnp.float32)
    down = shape((routing.experts, routing.hidden, routing.latent), jnp.float32)
    operands = rows, up, down, shape((routing.experts,), jnp.int32)
    assert pallas_tpu.unsupported(*operands) is None
    traced = jax.make_jaxpr(pallas_tpu.mlp_gradients)(*operands, rows)
    calls = [one for one in traced.eqns if one.primitive.name == "pallas_call"]
    assert len(calls) == 4
    given = [variable.aval for call in calls for variable in call.invars]
    matrices = [one.dtype for one in given if one.shape in (up.shape, down.shape)]
    assert matrices == [jnp.bfloat16] * 3  # both for the hidden and its gradient, up for the rows'
    assert [gradient.dtype for gradient in traced.out_avals[1:]] == [jnp.float32] * 2


def test_a_matrix_too_large_for_fast_memory_is_an_error_that_says_so():
    lhs = jax.ShapeDtypeStruct((256, 8192), jnp.bfloat16)
    rhs = jax.ShapeDtypeStruct((2, 8192, 8192), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(ValueError, match="MiB of fast memory"):
        jax.eval_shape(
            functools.partial(grouped_matmul, implementation="pallas_tpu"), lhs, rhs, sizes
        )
