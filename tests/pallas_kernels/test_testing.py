"""The harness passes a right kernel, fails each kind of wrong one, and names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.testing import check


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((7, 5)).astype(np.float32),
        "b": rng.standard_normal((5, 3)).astype(np.float32),
        "rows": np.arange(7, dtype=np.int32),
    }


def product(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return a @ b, jnp.sum(jnp.tanh(a[rows]))


def reordered(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.einsum("ik,kj->ij", a, b), jnp.tanh(a)[rows].sum(0).sum()


def one_wrong_element(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, total = product(a, b, rows)
    return values.at[6, 2].add(1e-3), total


def wrong_gradient(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return product(a, b + 1e-3 * (b - jax.lax.stop_gradient(b)), rows)


def not_a_number(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, total = product(a, b, rows)
    return values, total + jnp.where(rows[0] == 0, jnp.nan, 0.0)


def narrower(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, total = product(a, b, rows)
    return values.astype(jnp.bfloat16), total


def test_a_right_kernel_passes() -> None:
    check(reordered, product, arrays(), outputs=("values", "total"))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (one_wrong_element, r"^values: "),
        (wrong_gradient, r"^gradient of b: "),
        (not_a_number, r"^total: 1 elements are not finite"),
        (narrower, r"^values: dtype bfloat16"),
    ],
)
def test_a_wrong_kernel_fails_by_name(kernel, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(kernel, product, arrays(), outputs=("values", "total"))


TABLE = {
    "reference": dispatch.Implementation(lambda x: 0 * x),
    "xla": dispatch.Implementation(lambda x: 2 * x),
    "even": dispatch.Implementation(
        lambda x: 3 * x,
        unsupported=lambda x: f"{x.shape[0]} rows are not even" if x.shape[0] % 2 else None,
        platforms=("cpu",),
    ),
    "elsewhere": dispatch.Implementation(lambda x: 4 * x, platforms=("tpu", "cuda")),
}


def run(want: str | None, rows: int) -> float:
    x = jnp.ones((rows,))
    names = dispatch.choose("op", TABLE, want, x)
    return float(jax.jit(lambda x: dispatch.run(TABLE, names, "forward", x))(x)[0])


def test_the_target_platform_chooses_among_what_can_run() -> None:
    assert run(None, 4) == 3.0
    assert run(None, 5) == 2.0
    assert run("elsewhere", 4) == 4.0


def test_a_name_never_falls_back() -> None:
    with pytest.raises(ValueError, match="op: implementation='even' cannot run here: 5 rows are"):
        run("even", 5)
    with pytest.raises(ValueError, match="'fast' does not exist; choose one of elsewhere, even"):
        run("fast", 4)


def cube(kept: tuple[str, ...], platforms: tuple[str, ...], factor: float, limit: int = 99):
    """factor x³ + n, whose backward starts from what `kept` names: other arrays, other shapes."""

    def forward(x, n, *, power):
        assert power == 3
        given = {"x": x, "square": x * x, "padded": jnp.pad(x * x, (0, 5))}
        return factor * x**3 + n, tuple(given[name] for name in kept)

    def backward(residuals, cotangent, *, power):
        square = residuals[-1] ** 2 if kept[-1] == "x" else residuals[-1][: cotangent.shape[0]]
        return factor * power * square * cotangent, None

    unsupported = lambda x, n, **_: "too long" if x.shape[0] > limit else None
    return dispatch.Implementation(forward, backward, unsupported, platforms)


CUBE = dispatch.Op(
    "cube",
    {
        "xla": cube(("x",), (), 1.0),
        "wide": cube(("x", "padded"), ("cpu",), 2.0, limit=4),
        "elsewhere": cube(("x", "square"), ("tpu",), 4.0),
    },
)


@pytest.mark.parametrize(
    ("size", "options", "factor"),
    [
        (4, {}, 2.0),
        (5, {}, 1.0),  # what the platform prefers cannot run
        (4, {"target": "cpu"}, 2.0),
        (4, {"target": "tpu"}, 4.0),
        (4, {"target": "cuda"}, 1.0),
        (4, {"implementation": "elsewhere"}, 4.0),
        (4, {"implementation": "wide", "target": "tpu"}, 2.0),
    ],
)
def test_an_op_runs_and_differentiates_one_implementation(size, options, factor) -> None:
    x, n = jnp.arange(1.0, size + 1), jnp.arange(size)

    @jax.jit
    def both(x):
        op = lambda x: CUBE(x, n, power=3, **options)
        out, pullback = jax.vjp(op, x)
        return out, pullback(jnp.arange(size) + 1.0)[0]

    out, gradient = both(x)
    np.testing.assert_allclose(out, factor * x**3 + n, rtol=1e-6)
    np.testing.assert_allclose(gradient, 3 * factor * x**2 * (np.arange(size) + 1), rtol=1e-6)


def test_a_known_target_leaves_no_branch_to_the_lowering() -> None:
    x, n = jnp.ones(4), jnp.arange(4)

    def traced(target: str | None) -> str:
        loss = lambda x: jnp.sum(CUBE(x, n, power=3, target=target))
        return str(jax.make_jaxpr(jax.grad(loss))(x))

    assert "platform_index" in traced(None)
    assert "platform_index" not in traced("cpu")


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="cube: target='gpu' must be one of cpu, tpu, cuda, rocm"):
        CUBE(jnp.ones(4), jnp.arange(4), power=3, target="gpu")


def test_shapes_are_checked_letter_by_letter() -> None:
    sizes: dict[str, int] = {}
    dispatch.expect_shape("op", sizes, a=(np.zeros((2, 3)), "B T"))
    dispatch.expect_shape("op", sizes, b=(np.zeros((3, 5)), "T N"))
    assert sizes == {"B": 2, "T": 3, "N": 5}
    with pytest.raises(ValueError, match=r"op: c has shape \(4,\), but T of \[T\] is 3"):
        dispatch.expect_shape("op", sizes, c=(np.zeros(4), "T"))
    with pytest.raises(ValueError, match=r"op: c has shape \(4,\); it must be \[B, T\]"):
        dispatch.expect_shape("op", sizes, c=(np.zeros(4), "B T"))
