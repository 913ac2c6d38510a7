"""The golden data sets of tests/golden, loaded once; see their manifest."""

import functools
from pathlib import Path

import jax
import numpy as np

import nemotron_jax as nj

GOLDEN = Path(__file__).parent / "golden" / "public"
CASES = ("hybrid_moe_latent", "nano_like", "dense")


@functools.cache
def model(case: str) -> nj.Nemotron:
    return nj.load_pretrained(GOLDEN / case / "checkpoint")


@functools.cache
def reference(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "reference.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@functools.cache
def tokens(case: str) -> jax.Array:
    return jax.numpy.asarray(reference(case)["input_ids"], jax.numpy.int32)


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
