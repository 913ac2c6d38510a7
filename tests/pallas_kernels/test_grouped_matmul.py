"""Grouped products equal their definition; routing is a permutation and its inverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    combine_rows,
    gather_rows,
    grouped_matmul,
    grouped_mlp,
    grouped_mlp_gradients,
    grouped_outer,
    sort_by_expert,
)
from pallas_kernels.grouped_matmul import reference, routing, specs, tiles
from pallas_kernels.testing import check
from tests.marks import slow_but_for

F32 = 1e-5  # sums of at most 128 products of normal numbers in float32

_FAST = ("first, middle and last groups empty", "groups shorter and longer than a tile")
FEWER_CASES = slow_but_for(specs.EDGE_CASES, *_FAST)
CASES = slow_but_for(
    specs.EDGE_CASES, *_FAST, "one row", "rows past the sum", "no rows in any group"
)


@pytest.mark.parametrize("case", CASES)
def test_grouped_matmul_and_gradients_equal_the_definition(case):
    check(grouped_matmul, reference.grouped_matmul, case.matmul_arrays(), tolerance=F32)


@pytest.mark.parametrize("case", FEWER_CASES)
def test_transposed_experts_equal_the_definition(case):
    arrays = case.matmul_arrays()
    arrays["rhs"] = arrays["rhs"].swapaxes(1, 2).copy()

    def transposed(lhs, rhs, group_sizes):
        return reference.grouped_matmul(lhs, rhs.swapaxes(1, 2), group_sizes)

    op = functools.partial(grouped_matmul, transpose_rhs=True)
    check(op, transposed, arrays, tolerance=F32)


@pytest.mark.parametrize("case", FEWER_CASES)
def test_grouped_mlp_and_gradients_equal_the_definition(case):
    check(grouped_mlp, reference.grouped_mlp, case.mlp_arrays(), tolerance=F32)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_of_matrices_in_bfloat16_are_float32_sums(implementation):
    arrays = specs.EDGE_CASES[5].mlp_arrays()
    low = {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in ("lhs", "up", "down")}
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(low["lhs"].shape), jnp.bfloat16)
    sizes = jnp.asarray(arrays["group_sizes"])
    mlp = lambda *operands: reference.grouped_mlp(*operands, sizes)
    wide = [a.astype(jnp.float32) for a in low.values()]
    expected = jax.vjp(mlp, *wide)[1](dout.astype(jnp.float32))
    found = grouped_mlp_gradients(
        **low, group_sizes=sizes, dout=dout, implementation=implementation
    )
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for got, value in zip(found, expected, strict=True):
        # A hidden is rounded to bfloat16 on the way, by 2**-9 of itself at most.
        assert jnp.linalg.norm(got - value) < 2**-8 * jnp.linalg.norm(value)


def test_each_expert_has_a_scale_that_is_a_constant():
    case = specs.EDGE_CASES[5]
    scale = jnp.asarray([2.0, 0.5, -3, 7, 11, 0], jnp.float32)
    op = functools.partial(grouped_matmul, scale=scale)
    scaled = functools.partial(reference.grouped_matmul, scale=scale)
    check(op, scaled, case.matmul_arrays(), tolerance=F32)
    arrays = {name: jnp.asarray(a) for name, a in case.matmul_arrays().items()}
    total = lambda scale: jnp.sum(grouped_matmul(**arrays, scale=scale))
    assert not np.any(jax.grad(total)(scale))


def test_the_definitions_run_as_implementations():
    case = specs.EDGE_CASES[3]
    op = functools.partial(grouped_matmul, implementation="reference")
    check(op, reference.grouped_matmul, case.matmul_arrays(), tolerance=F32)
    op = functools.partial(grouped_mlp, implementation="reference")
    check(op, reference.grouped_mlp, case.mlp_arrays(), tolerance=F32)


def test_grouped_mlp_is_two_grouped_matmuls_with_a_squared_relu_between():
    arrays = specs.EDGE_CASES[5].mlp_arrays()

    def two(lhs, up, down, group_sizes):
        hidden = jnp.square(jax.nn.relu(grouped_matmul(lhs, up, group_sizes)))
        return grouped_matmul(hidden, down, group_sizes)

    check(grouped_mlp, two, arrays, tolerance=F32)


@pytest.mark.parametrize("seed", range(2))
def test_random_sizes_equal_the_definition(seed):
    rng = np.random.default_rng(seed)
    experts, rows = int(rng.integers(1, 40)), int(rng.integers(1, 900))
    sizes = np.bincount(rng.integers(0, experts, int(rng.integers(0, rows + 1))), minlength=experts)
    case = specs.Case("random", rows, int(rng.integers(1, 60)), 17, tuple(sizes))
    check(grouped_matmul, reference.grouped_matmul, case.matmul_arrays(seed), tolerance=F32)
    check(grouped_mlp, reference.grouped_mlp, case.mlp_arrays(seed), tolerance=F32)


def test_bfloat16_rows_are_summed_in_float32():
    case = specs.EDGE_CASES[5]
    arrays = case.matmul_arrays(dtype=jnp.bfloat16)
    check(grouped_matmul, reference.grouped_matmul, arrays, tolerance=4e-3)  # one rounding: 2^-9
    arrays = {**arrays, "dout": case.matmul_arrays(1, jnp.bfloat16)["lhs"]}
    weight_gradient = grouped_outer(arrays["lhs"], arrays["dout"], arrays["group_sizes"])
    expected = reference.grouped_outer(arrays["lhs"], arrays["dout"], arrays["group_sizes"])
    assert weight_gradient.dtype == jnp.float32
    np.testing.assert_allclose(weight_gradient, expected, rtol=1e-5, atol=1e-4)


def test_empty_groups_have_exactly_zero_gradients_even_beside_infinite_rows():
    case = specs.Case("infinite", 40, 8, 8, (0, 10, 0, 20, 0))
    arrays = {name: jnp.asarray(a) for name, a in case.matmul_arrays().items()}
    lhs = arrays["lhs"].at[30:].set(jnp.inf).at[9].set(jnp.nan)  # past the sum; inside group 1
    dout = jnp.ones((40, 8)).at[35].set(jnp.nan)
    gradient = grouped_outer(lhs, dout, arrays["group_sizes"])
    assert not np.any(gradient[np.array([0, 2, 4])])
    assert np.isfinite(gradient[3]).all() and np.isnan(gradient[1]).any()
    out = grouped_matmul(lhs, arrays["rhs"], arrays["group_sizes"])
    assert not np.any(out[30:]) and np.isfinite(out[:9]).all()


def test_the_harness_rejects_a_kernel_that_drops_the_last_row_of_a_group():
    def wrong(lhs, rhs, group_sizes):
        return grouped_matmul(lhs, rhs, group_sizes).at[group_sizes[0] - 1].set(0)

    arrays = specs.EDGE_CASES[3].matmul_arrays()
    with pytest.raises(AssertionError, match="output"):
        check(wrong, reference.grouped_matmul, arrays, tolerance=F32)


def test_the_harness_rejects_a_gradient_that_misses_an_expert():
    @jax.custom_vjp
    def wrong(lhs, rhs, group_sizes):
        return grouped_matmul(lhs, rhs, group_sizes)

    def backward(residuals, dout):
        lhs, rhs, sizes = residuals
        dlhs = grouped_matmul(dout, rhs, sizes, transpose_rhs=True)
        return dlhs, grouped_outer(lhs, dout, sizes).at[2].set(0), None

    wrong.defvjp(lambda *operands: (wrong(*operands), operands), backward)
    arrays = specs.EDGE_CASES[3].matmul_arrays()
    with pytest.raises(AssertionError, match="gradient of rhs"):
        check(wrong, reference.grouped_matmul, arrays, tolerance=F32)


def flops_of_a_tile(jaxpr):
    """Height of the tiles -> FLOPs of all matrix products in the loops that have this height."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = equation.outvars[0].aval
            total += 2 * out.size * int(np.prod([left[axis] for axis in contracting]))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += flops_of_a_tile(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("experts", [16, 128, 512])
def test_cost_follows_the_rows_and_not_the_number_of_experts(experts):
    """FLOPs that run, from the program: those of each level's loop body times its used tiles."""
    rows, width = 2048, 32
    routed = np.random.default_rng(experts).integers(0, experts, rows)
    sizes = jnp.asarray(np.bincount(routed, minlength=experts), jnp.int32)
    heights = tiles.tile_heights(rows, experts, width * width)
    tables = tiles.tile_tables(sizes, rows, heights)
    shapes = [
        jnp.zeros(s) for s in ((rows, width), (experts, width, width), (experts, width, width))
    ]
    program = jax.make_jaxpr(grouped_mlp)(*shapes, sizes)
    a_row = 2 * 2 * width * width  # two products
    assert flops_of_a_tile(program.jaxpr) == a_row * sum(heights)  # nothing outside the loops
    assert sum(int(t.used) * t.height for t in tables) <= 2.5 * rows  # dense: experts * rows
    for table in tables:
        assert int(table.used) <= tiles.tile_bound(rows, experts, table.height)


@pytest.mark.parametrize(
    "rows, experts, matrix", [(16384, 16, 128 * 128), (2048, 16, 128 * 128), (32, 16, 64)]
)
def test_balanced_groups_waste_little_of_their_tiles(rows, experts, matrix):
    heights = tiles.tile_heights(rows, experts, matrix)
    sizes = np.bincount(np.random.default_rng(0).integers(0, experts, rows), minlength=experts)
    tables = tiles.tile_tables(jnp.asarray(sizes), rows, heights)
    assert sum(int(t.used) * t.height for t in tables) <= (1.2 if rows > 64 else 3) * rows


def test_tiles_cover_each_routed_row_once_with_its_expert():
    sizes, rows = np.array([3, 0, 17, 8, 100, 0]), 140
    owner = np.full(rows, -1)
    for table in tiles.tile_tables(jnp.asarray(sizes), rows, (32, 8, 4)):
        for i in range(int(table.used)):
            first, last = int(table.first[i]), int(table.last[i])
            assert 0 < last - first <= table.height and (owner[first:last] == -1).all()
            owner[first:last] = table.expert[i]
    np.testing.assert_array_equal(owner, [*np.repeat(np.arange(6), sizes), *[-1] * 12])


def test_sizes_past_the_rows_are_cut_off():
    arrays = specs.Case("long", 20, 8, 8, (15, 5)).matmul_arrays()
    cut = grouped_matmul(arrays["lhs"], arrays["rhs"], jnp.asarray([15, 50], jnp.int32))
    np.testing.assert_array_equal(cut, grouped_matmul(**arrays))


@pytest.mark.parametrize(
    "tokens, choices, experts", [(1, 4, 16), (33, 3, 5), (64, 2, 512), (7, 1, 1)]
)
def test_sorted_order_is_a_stable_permutation(tokens, choices, experts):
    rng = np.random.default_rng(tokens)
    index = rng.integers(0, experts, (tokens, choices)).astype(np.int32)
    order = jax.jit(sort_by_expert, static_argnums=1)(index, experts)
    flat = index.reshape(-1)
    np.testing.assert_array_equal(order.row_entry, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(
        order.entry_row.reshape(-1)[order.row_entry], np.arange(flat.size)
    )
    np.testing.assert_array_equal(order.group_sizes, np.bincount(flat, minlength=experts))


def test_foreign_experts_and_padding_come_last_and_belong_to_no_group():
    index = jnp.asarray([[0, -1], [2, 3], [1, 0], [2, 1]], jnp.int32)
    valid = jnp.asarray([True, True, True, False])
    order = sort_by_expert(index, 3, valid)
    np.testing.assert_array_equal(order.group_sizes, [2, 1, 1])
    np.testing.assert_array_equal(order.row_entry, [0, 5, 4, 2, 1, 3, 6, 7])


@pytest.mark.parametrize("align", [2, 16])
def test_aligned_groups_are_filled_up_with_empty_rows(align):
    index = jnp.asarray(np.random.default_rng(0).integers(-1, 7, (29, 3)), jnp.int32)
    plain, order = sort_by_expert(index, 6), sort_by_expert(index, 6, align=align)
    np.testing.assert_array_equal(order.load, plain.group_sizes)
    np.testing.assert_array_equal(order.group_sizes, -(-np.asarray(plain.load) // align) * align)
    starts = np.cumsum(order.group_sizes) - order.group_sizes
    held = np.asarray(order.holds)
    for expert, (start, count) in enumerate(zip(starts, plain.load)):
        rows = np.asarray(order.row_entry)[start : start + count]
        np.testing.assert_array_equal(rows, np.flatnonzero(index.reshape(-1) == expert))
        assert held[start : start + count].all()
    assert held.sum() == plain.load.sum() and held.size % align == 0
    routed = np.asarray(order.routed)
    np.testing.assert_array_equal(routed, (index >= 0) & (index < 6))
    entry = np.arange(index.size).reshape(index.shape)
    found = np.asarray(order.row_entry)[np.asarray(order.entry_row)]
    np.testing.assert_array_equal(found[routed], entry[routed])


@pytest.mark.parametrize("align", [1, 16])
def test_alignment_changes_no_routed_value_and_no_gradient(align):
    rng = np.random.default_rng(1)
    index = jnp.asarray(rng.integers(-1, 6, (33, 3)), jnp.int32)
    order = sort_by_expert(index, 5, align=align)

    def routed(x, weights, up, down):
        rows = grouped_mlp(gather_rows(x, order), up, down, order.group_sizes)
        return combine_rows(rows, weights, order)

    def one_by_one(x, weights, up, down):
        hidden = jnp.square(jax.nn.relu(jnp.einsum("tl,elf->tef", x, up)))
        every = jnp.einsum("tef,efl->tel", hidden, down)
        here = ((index >= 0) & (index < 5))[..., None]
        chosen = jnp.take_along_axis(every, jnp.clip(index, 0, 4)[..., None], axis=1)
        return jnp.einsum("trl,tr->tl", jnp.where(here, chosen, 0), weights)

    shapes = {"x": (33, 8), "weights": (33, 3), "up": (5, 8, 12), "down": (5, 12, 8)}
    arrays = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    check(routed, one_by_one, arrays, tolerance=F32)


def test_sorting_keys_too_large_for_one_word_agrees(monkeypatch):
    index = np.random.default_rng(0).integers(0, 9, (50, 3)).astype(np.int32)
    one = sort_by_expert(index, 9)
    monkeypatch.setattr(routing, "LARGEST_KEY", 9 * 150)
    two = sort_by_expert(index, 9)
    np.testing.assert_array_equal(one.row_entry, two.row_entry)


@pytest.mark.parametrize("tokens, choices, experts, align", [(300, 5, 7, 1), (129, 3, 40, 16)])
def test_counting_gives_the_sorted_order(tokens, choices, experts, align):
    key = np.random.default_rng(0).integers(0, experts + 1, (tokens, choices)).astype(np.int32)
    key[:4] = [experts] * choices  # tokens without experts, and then one that names one twice
    key[4] = 2
    both = [
        jax.jit(order, static_argnums=(1, 2))(key, experts, align)
        for order in (routing._by_sorting, routing._by_counting)
    ]
    for name, wanted, counted in zip(("row", "holds", "entry", "sizes", "load"), *both):
        np.testing.assert_array_equal(counted, wanted, err_msg=name)
        assert counted.dtype == wanted.dtype, name


def test_many_choices_are_combined_in_a_loop_with_the_same_numbers(monkeypatch):
    rng = np.random.default_rng(4)
    order = sort_by_expert(rng.integers(-1, 6, (17, 9)).astype(np.int32), 5)
    rows = rng.standard_normal((153, 4)).astype(np.float32)
    arrays = {"rows": rows, "weights": rng.random((17, 9)).astype(np.float32)}
    combine = functools.partial(combine_rows, order=order)

    def unrolled(rows, weights):
        with monkeypatch.context() as patch:
            patch.setattr(routing, "UNROLLED", 9)
            return combine(rows, weights)

    check(combine, unrolled, arrays, tolerance=1e-6)


ROUTED = [("all", None), ("some", (True, False, True) * 11)]


@pytest.mark.parametrize("name, valid", ROUTED, ids=[name for name, _ in ROUTED])
def test_gather_and_combine_equal_indexing_in_values_and_gradients(name, valid):
    rng = np.random.default_rng(3)
    index = rng.integers(-1, 6, (33, 3)).astype(np.int32)  # -1 and 5: other devices' experts
    order = sort_by_expert(index, 5, None if valid is None else jnp.asarray(valid))
    routed = (index >= 0) & (index < 5) & (True if valid is None else np.array(valid)[:, None])
    row_routed = routed.reshape(-1)[np.asarray(order.row_entry)][:, None]
    token = np.asarray(order.row_entry) // 3
    rows = rng.standard_normal((99, 7)).astype(np.float32)

    def gathered(x):
        return jnp.where(row_routed, x[token], 0)

    def combined(rows, weights):
        picked = rows[order.entry_row.reshape(-1)].reshape(33, 3, 7)
        return jnp.sum(jnp.where(routed[..., None], picked * weights[..., None], 0), axis=1)

    x = {"x": rng.standard_normal((33, 7)).astype(np.float32)}
    check(functools.partial(gather_rows, order=order), gathered, x, tolerance=F32)
    both = {"rows": rows, "weights": rng.random((33, 3)).astype(np.float32)}
    check(functools.partial(combine_rows, order=order), combined, both, tolerance=F32)


def test_routing_and_its_gradient_add_nothing_by_scattering():
    case = specs.SHAPES["decode 8"]
    index, weights = case.expert_index(), jnp.ones((case.tokens, case.choices))

    def routed(x, weights, up, down):
        order = sort_by_expert(index, case.experts)
        rows = grouped_mlp(gather_rows(x, order), up, down, order.group_sizes)
        return jnp.sum(combine_rows(rows, weights, order))

    shapes = (case.tokens, 8), (case.experts, 8, 8), (case.experts, 8, 8)
    x, up, down = (jnp.ones(s) for s in shapes)
    text = str(jax.make_jaxpr(jax.grad(routed, argnums=(0, 1, 2, 3)))(x, weights, up, down))
    adds = [line for line in text.splitlines() if "scatter-add" in line]
    assert all(f"i32[{case.experts + 1}]" in line for line in adds)  # counting, of integers
    assert " = scatter[" in text  # the inverse permutation: each index once


@pytest.mark.parametrize("valid", [None, "some"])
def test_the_routed_path_equals_experts_applied_one_by_one(valid):
    case = specs.Routing("small", 37, choices=3, experts=6, latent=16, hidden=24)
    rng = np.random.default_rng(5)
    index = case.expert_index()
    keep = np.ones(37, bool) if valid is None else rng.random(37) < 0.7

    def routed(x, weights, up, down):
        order = sort_by_expert(index, 6, jnp.asarray(keep))
        rows = grouped_mlp(gather_rows(x, order), up, down, order.group_sizes)
        return combine_rows(rows, weights, order)

    def one_by_one(x, weights, up, down):
        hidden = jnp.square(jax.nn.relu(jnp.einsum("tl,elf->tef", x, up)))
        every = jnp.einsum("tef,efl->tel", hidden, down)
        chosen = jnp.take_along_axis(every, index[..., None], axis=1)
        return jnp.einsum("trl,tr->tl", chosen, weights) * keep[:, None]

    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    arrays = {"x": normal(37, 16), "weights": rng.random((37, 3)).astype(np.float32)}
    arrays |= {"up": normal(6, 16, 24) / 4, "down": normal(6, 24, 16) / 5}
    check(routed, one_by_one, arrays, tolerance=F32)


def test_wrong_shapes_and_names_are_errors_that_say_who_and_what():
    arrays = specs.EDGE_CASES[3].matmul_arrays()
    with pytest.raises(ValueError, match="grouped_matmul: rhs has shape"):
        grouped_matmul(arrays["lhs"], arrays["rhs"][:, 1:], arrays["group_sizes"])
    with pytest.raises(ValueError, match="group_sizes has dtype float32"):
        grouped_matmul(arrays["lhs"], arrays["rhs"], arrays["group_sizes"].astype(np.float32))
    with pytest.raises(ValueError, match="grouped_matmul: implementation='fast'"):
        grouped_matmul(**arrays, implementation="fast")
    with pytest.raises(ValueError, match="rows=0"):
        grouped_matmul(arrays["lhs"][:0], arrays["rhs"], arrays["group_sizes"])
