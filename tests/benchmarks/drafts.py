"""What drafts cost beside a plain step of decoding, on this CPU, and what its products cost.

    python -m tests.benchmarks.drafts [--rows=1] [--drafts=3] [--repetitions=40]

The model is that of configs/speculative_tiny.py with random weights. Wall time, the best of the
repetitions, whose kinds of work take turns: run it on a machine with nothing else to do.
"""

import argparse
import collections
import os
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nemotron_jax as nj
from configs import models
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.evaluation.draft_speed import measure_costs
from nemotron_jax.model.parameters import flatten

COPIES = 16  # of a matrix, so that it comes from memory as a step's does


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the arguments say, and print some lines."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.drafts", description=__doc__)
    for name, default in (("rows", 1), ("drafts", 3), ("repetitions", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(arguments)
    tokens = flags.drafts + 1
    model = for_decoding(nj.Nemotron(models.speculative(), rngs=nnx.Rngs(0)))
    draws = np.random.default_rng(0).integers(3, model.config.vocab_size, (flags.rows, 64))
    costs = measure_costs(model, draws.tolist(), flags.drafts, repetitions=flags.repetitions)
    print(
        f"{flags.rows} rows: a plain step {1e3 * costs.step:.2f} ms; c_d {costs.draft:.3f}; "
        f"c_v({tokens}) {costs.verification:.2f}; load {os.getloadavg()[0]:.1f}"
    )
    shapes = collections.Counter(
        leaf.shape
        for name, leaf in flatten(model).items()
        if leaf.ndim == 2 and name.endswith("weight") and "mtp" not in name and "conv" not in name
    )
    sums = [0.0, 0.0]
    for shape, count in sorted(shapes.items(), key=lambda item: -np.prod(item[0]) * item[1]):
        one, more = (product_s(shape, flags.rows * n, flags.repetitions) for n in (1, tokens))
        sums = [sums[0] + count * one, sums[1] + count * more]
        print(
            f"  {count} of {shape}: {1e6 * one:.0f} µs for a token, {1e6 * more:.0f} for {tokens}"
        )
    extra = costs.verify - costs.step
    print(
        f"dense products of a step {1e3 * sums[0]:.2f} ms, of {tokens} tokens {1e3 * sums[1]:.2f}: "
        f"{100 * (sums[1] - sums[0]) / extra:.0f} % of what a verification takes more"
    )
    return 0


def product_s(shape: tuple[int, int], rows: int, repetitions: int) -> float:
    """Seconds of a product of so many rows with a matrix that no cache holds."""
    matrices = jax.random.normal(jax.random.key(0), (COPIES, *shape))

    @jax.jit
    def run(x: jax.Array, matrices: jax.Array) -> jax.Array:
        def step(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, None]:
            # What comes out is fed again, so that one product waits for the last.
            return x + 1e-9 * jnp.sum(x @ matrix), None

        return jax.lax.scan(step, x, matrices)[0]

    x = jnp.ones((rows, shape[0]))
    return best_s(lambda: jax.block_until_ready(run(x, matrices)), repetitions) / COPIES


def best_s(run: Callable[[], object], repetitions: int) -> float:
    """Seconds of the fastest call after a first one."""
    run()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
