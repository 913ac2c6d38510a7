"""Qwix's NVFP4 beside ours: what rounding costs the same tensors, and how long it takes.

    python -m pip install --no-deps qwix==0.1.8    # for this command alone; nothing here needs it
    python -m tests.benchmarks.qwix_nvfp4

Both round along rows in blocks of 16, to the nearest. The error is that of a matrix that is rounded
and given back, |x - x'| / |x| of all its elements; times are the median of compiled calls.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import nvfp4

ROWS, COLUMNS, CALLS = 1024, 1024, 15


def tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Matrices by name: Gaussian ones of some sizes, and one with few large rows among small
    ones, as gradients have."""
    draw = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    for scale in (1.0, 1e-2, 1e-3, 1e-4):
        yield f"Gaussian, deviation {scale:g}", scale * draw
    rows = np.where(np.arange(ROWS) % 64 == 0, 1e-2, 1e-5).astype(np.float32)
    yield "one row in 64 of 1e-2, the others 1e-5", rows[:, None] * draw


def ours(x: jax.Array) -> jax.Array:
    """As training rounds: without making the codes."""
    amax = jnp.max(jnp.abs(x))
    return nvfp4.round_trip(x, block=(1, 16), amax=amax) * (amax / 2688)


def theirs() -> Callable[[jax.Array], jax.Array]:
    """Qwix's, as its public functions are called."""
    from qwix._src.core import qarray

    how = qarray.HowToQuantize(qtype="nvfp4", channelwise_axes=(0,), tiled_axes={1: 16})
    return lambda x: qarray.dequantize(qarray.quantize(x, how)).astype(jnp.float32)


def error(x: np.ndarray, rounded: np.ndarray) -> float:
    """Of the whole matrix, relative."""
    return float(np.linalg.norm(rounded - x) / np.linalg.norm(x))


def milliseconds(function: Callable, x: jax.Array) -> float:
    """Median of some calls after the first."""
    jax.block_until_ready(function(x))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    functions = {"ours": jax.jit(ours), "qwix": jax.jit(theirs())}
    print(f"{ROWS} x {COLUMNS} float32, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'tensor':45}" + "".join(f"{name:>10}" for name in functions) + "   zeros: ours, qwix")
    for name, x in tensors():
        rounded = {of: np.asarray(run(x), np.float32) for of, run in functions.items()}
        shares = "".join(f"{error(x, found):10.4f}" for found in rounded.values())
        zeros = "".join(f"{np.mean(found == 0):9.3f}" for found in rounded.values())
        print(f"{name:45}{shares}{zeros}")
    x = jnp.asarray(next(tensors())[1])
    took = {name: milliseconds(run, x) for name, run in functions.items()}
    print("milliseconds: " + ", ".join(f"{name} {value:.2f}" for name, value in took.items()))


if __name__ == "__main__":
    main()
