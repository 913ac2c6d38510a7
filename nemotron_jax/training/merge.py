"""Averages of checkpoints that stand in for a decay of the learning rate.

In a run at a constant learning rate let D_j be the sum of the updates between checkpoints j-1 and
j, so that checkpoint i is theta_1 + D_2 + ... + D_i. Their average with weights w_i of sum one is

    sum_i w_i theta_i = theta_1 + sum_j D_j (w_j + w_{j+1} + ... + w_n):

each update counts by the weights of the checkpoints after it. Had the learning rate fallen by a
factor S_j over that interval, and had the gradients been the same, the updates would have been
S_j D_j. So we set w_j + ... + w_n = S_j to the decay's mean over the interval, and difference it:
w_j = S_j - S_{j+1}, with S_1 = 1 and S_{n+1} = 0. A decay falls, so no weight is negative.
Source of the method: nemotron3_super report (windows of 125 to 500 billion tokens, minus-sqrt).
"""

import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

Table = dict[str, jax.Array]


def minus_sqrt_weights(steps: Sequence[int], final_ratio: float = 0.0) -> list[float]:
    """Weights of the checkpoints at ascending `steps`, as if the rate had decayed over them.

    The emulated factor is r + (1 - r) (1 - sqrt(progress)), r being `final_ratio`. Non-negative,
    with sum one; a single checkpoint has weight one. Raises ValueError for other steps.
    """
    if not steps or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"minus_sqrt_weights: steps={list(steps)} must ascend, at least one")
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"minus_sqrt_weights: final_ratio={final_ratio} must lie in [0, 1]")
    span = max(steps[-1] - steps[0], 1)
    progress = [(step - steps[0]) / span for step in steps]
    # The integral of 1 - (1 - r) sqrt(p) from 0 to p.
    area = [p - (1 - final_ratio) * 2 / 3 * p**1.5 for p in progress]
    mean = [(area[j] - area[j - 1]) / (progress[j] - progress[j - 1]) for j in range(1, len(steps))]
    return [a - b for a, b in itertools.pairwise([1.0, *mean, 0.0])]


def merge(tables: Iterable[Table], weights: Sequence[float]) -> Table:
    """The weighted sum of parameter tables, added in float32; holds two tables at a time.

    Raises ValueError when the tables differ in names or are not as many as the weights.
    """
    total: Table | None = None
    dtypes = {}
    tables = iter(tables)
    for number, weight in enumerate(weights):
        table = next(tables, None)
        if table is None:
            raise ValueError(f"merge: {number} tables for {len(weights)} weights")
        if total is None:
            dtypes = {name: leaf.dtype for name, leaf in table.items()}
            total = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in table.items()}
        if table.keys() != total.keys():
            raise ValueError(
                f"merge: table {number} differs in {sorted(table.keys() ^ total.keys())[:5]}; "
                "merge checkpoints of one run"
            )
        for name, leaf in table.items():
            total[name] = total[name] + weight * leaf.astype(jnp.float32)
    if total is None or next(tables, None) is not None:
        raise ValueError(f"merge: the tables are not as many as the {len(weights)} weights")
    return {name: leaf.astype(dtypes[name]) for name, leaf in total.items()}
