"""The parts of a step, and the table of them."""

import pytest

from tests.benchmarks import parts


@pytest.mark.more  # a model of ten million parameters, a few times over
def test_the_parts_products_are_those_of_the_step():
    *pieces, step = parts.parts(rows=1, length=32)
    whole = sum(3 * part.layers * part.flops for part in pieces if not part.name.startswith("."))
    assert whole == pytest.approx(step.flops, rel=0.01)


def test_the_table_says_how_far_each_part_is_from_its_floor():
    of = {"layers": 2, "forward_cpu_s": 0.1, "wall_s": 0.2, "gflop": 1.0, "moved_mb": 3.0}
    found = {
        "rows": 8,
        "length": 512,
        "cpu": "some CPU",
        "versions": {"jax": "0.10"},
        "flops_per_cpu_second": 1e11,
        "bytes_per_cpu_second": 1e10,
        "parts": [
            {"part": "norms", "cpu_s": 0.25, "floor_cpu_s": 0.1, **of},
            {"part": "the whole step", "cpu_s": 1.0, "floor_cpu_s": 0.4, **of},
        ],
    }
    first, *_, norms, step = parts.table(found)
    assert "100 GFLOP/s" in first and "10.0 GB/s" in first
    assert norms == "| norms | 2 | 100 | 250 | 25% | 1.0 | 3 | 100 | 2.5 |"
    assert step.endswith("| 400 | 2.5 |")
