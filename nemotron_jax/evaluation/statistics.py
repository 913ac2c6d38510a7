"""Means over items with their intervals, shares of samples, and paired tests."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemotron_jax.evaluation.suite import Counts, Value

NORMAL_95 = 1.959964  # standard deviations on either side of a mean's 95 % interval
Items = Mapping[str, tuple[float, float]]


def value_over(
    items: Items, *, unit: str = "", chance: float | None = None, better: str = "higher"
) -> Value:
    """The sum of the items' amounts over the sum of their sizes, with its 95 % interval.

    The interval of a ratio of means by linearisation, items being the sample (Cochran, Sampling
    Techniques, section 6.5); Wilson's where every item is 0 or 1 of 1; none for a single item.
    The rest are fields of `Value`. Raises ValueError without items.
    """
    if not items:
        raise ValueError("value_over: no item was scored, so there is no mean")
    amounts, sizes = np.array(list(items.values()), np.float64).T
    mean = float(amounts.sum() / sizes.sum())
    binary = bool(np.all(sizes == 1) and np.all((amounts == 0) | (amounts == 1)))
    if binary:
        interval = wilson(int(amounts.sum()), len(amounts))
    else:
        interval = _linearised(amounts, sizes, mean)
    return Value(mean, interval, len(items), unit, chance, better=better, items=dict(items))


def percent(share: Value) -> Value:
    """A share as a value of 100. Wilson's interval is one of shares: it is found before."""
    interval = share.interval and (100 * share.interval[0], 100 * share.interval[1])
    items = {name: (100 * amount, size) for name, (amount, size) in share.items.items()}
    return dataclasses.replace(share, mean=100 * share.mean, interval=interval, items=items)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = NORMAL_95, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == n else middle + half


def _linearised(amounts: np.ndarray, sizes: np.ndarray, mean: float) -> tuple[float, float] | None:
    count = len(amounts)
    if count < 2:
        return None
    residuals = amounts - mean * sizes
    half = NORMAL_95 * math.sqrt(count / (count - 1) * float(residuals @ residuals)) / sizes.sum()
    return float(mean - half), float(mean + half)


def items_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """By task the mean score of its samples, each of size 1; failures of the machinery left out."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        if line["score"] is not None:
            scores.setdefault(line["task"], []).append(float(line["score"]))
    return {task: (sum(found) / len(found), 1.0) for task, found in scores.items()}


def pass_at(successes: int, n: int, k: int) -> float:
    """The chance that one of k samples succeeds, unbiased from n >= k (Chen et al. 2021)."""
    return 1 - math.comb(n - successes, k) / math.comb(n, k)


def pass_all(successes: int, n: int, k: int) -> float:
    """pass^k: the chance that all of k samples succeed, unbiased from n >= k (tau-bench)."""
    return math.comb(successes, k) / math.comb(n, k)


def pass_items(
    lines: Sequence[Mapping[str, Any]], k: int, *, every: bool = False
) -> dict[str, tuple[float, float]]:
    """By task the chance that one of k samples succeeds (with `every`: all), a score of 1 being
    success; tasks with fewer samples left out."""
    found: dict[str, list[bool]] = {}
    for line in lines:
        if line["score"] is not None:
            found.setdefault(line["task"], []).append(line["score"] == 1)
    chance = pass_all if every else pass_at
    return {
        task: (chance(sum(right), len(right), k), 1.0)
        for task, right in found.items()
        if len(right) >= k
    }


def pass_values(
    lines: Sequence[Mapping[str, Any]], k: int, *, unit: str, chance: float | None = None
) -> dict[str, Value]:
    """pass@1, and with several samples a task pass@k and pass^k; those of no task left out."""
    items = {"pass@1": pass_items(lines, 1)}
    if k > 1:
        items[f"pass@{k}"] = pass_items(lines, k)
        items[f"pass^{k}"] = pass_items(lines, k, every=True)
    return {
        name: value_over(found, unit=unit, chance=chance) for name, found in items.items() if found
    }


def counts_of(lines: Sequence[Mapping[str, Any]]) -> Counts:
    """What went wrong in the lines of transcripts."""
    failed = sum(line["score"] is None for line in lines)
    cut = sum(line["finish_reason"] == "length" for line in lines if line["score"] is not None)
    return Counts(cut, sum(not line["answered"] for line in lines) - failed, failed)
