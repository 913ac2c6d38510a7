"""One harness for every kernel: values and every gradient equal the reference's, by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, Any]
Op = Callable[..., Any]


def check(
    op: Op,
    reference: Op,
    arrays: Arrays,
    *,
    outputs: Sequence[str] = ("output",),
    tolerance: float = 1e-5,
    gradient_tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Raises AssertionError naming the first output or gradient in which `op` leaves `reference`.

    Both take `arrays` by name and return one array, or a tuple with a name each in `outputs`;
    options are bound by the caller (functools.partial). Every floating array is differentiated
    against random cotangents of every output, under jit. The error is relative: |a - b| / |b| in
    the L2 norm, and against the largest magnitude element by element, so that one bad element in a
    large array shows.
    """
    values, gradients = outputs_and_gradients(op, arrays, outputs, seed)
    expected, expected_gradients = outputs_and_gradients(reference, arrays, outputs, seed)
    for name in outputs:
        assert_close(values[name], expected[name], tolerance, name)
    for name, gradient in gradients.items():
        limit = tolerance if gradient_tolerance is None else gradient_tolerance
        assert_close(gradient, expected_gradients[name], limit, f"gradient of {name}")


def outputs_and_gradients(
    op: Op, arrays: Arrays, outputs: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Named outputs of `op`, and named gradients of their product with seeded random cotangents."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    constants = {k: v for k, v in arrays.items() if not is_floating(v)}
    variables = {k: v for k, v in arrays.items() if is_floating(v)}

    def named(variables: Arrays) -> dict[str, Any]:
        result = op(**variables, **constants)
        result = result if isinstance(result, tuple) else (result,)
        return dict(zip(outputs, result, strict=True))

    @jax.jit
    def both(variables: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
        values, pullback = jax.vjp(named, variables)
        rng = np.random.default_rng(seed)
        cotangents = {
            name: jnp.asarray(rng.standard_normal(values[name].shape), values[name].dtype)
            for name in outputs
        }
        return values, pullback(cotangents)[0]

    return both(variables)


def is_floating(array: Any) -> bool:
    """Whether an array holds floats, bfloat16 and smaller ones too."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def assert_close(actual: Any, expected: Any, tolerance: float, name: str) -> None:
    """Same shape and dtype, finite, within `tolerance` of `expected` in norm and by element."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, expected {expected.shape}"
    )
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    )
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if not b.size:
        return
    assert np.isfinite(b).all(), f"{name}: the reference itself is not finite"
    assert np.isfinite(a).all(), (
        f"{name}: {np.size(a) - np.isfinite(a).sum()} elements are not finite"
    )
    gap = np.abs(a - b)
    norm = np.linalg.norm(gap) / max(np.linalg.norm(b), np.finfo(np.float32).tiny)
    assert norm <= tolerance, f"{name}: relative L2 error {norm:.2e} exceeds {tolerance:.1e}"
    worst = np.unravel_index(gap.argmax(), gap.shape)
    largest = gap[worst] / np.abs(b).max() if gap[worst] else 0.0
    # An element may err by more than the norm's share, but not by more than a few times it.
    assert largest <= 4 * tolerance, (
        f"{name}: element {worst} is {a[worst]:.6g}, expected {b[worst]:.6g} "
        f"(error {largest:.2e} of the largest magnitude)"
    )
