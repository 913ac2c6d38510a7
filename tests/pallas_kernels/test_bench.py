"""The benchmark's floors are of the named cases, and a case too large here is not run."""

import numpy as np

from pallas_kernels import bench


def test_every_op_and_shape_has_a_floor_and_a_small_one_is_timed() -> None:
    found = {(one.op, one.shape): one for one in bench.benches()}
    assert {op for op, _ in found} >= {"ssd_scan", "attention", "causal_conv1d", "grouped_mlp"}
    speed = bench.Machine(flops=1e11, bytes=1e10)
    forward, backward = bench.timed(found["grouped_mlp", "super"], speed, most_seconds=0.1)
    # 8,192 tokens by 22 of 512 experts: two products of 1024 x 2688.
    assert np.isclose(forward["floor_milliseconds"], 4 * 8192 * 22 * 1024 * 2688 / 1e8)
    assert backward["floor_milliseconds"] == 3 * forward["floor_milliseconds"]
    assert forward["milliseconds"] is backward["milliseconds"] is None
    rows = list(bench.timed(found["grouped_mlp", "decode 1"], speed, most_seconds=1))
    assert all(row["milliseconds"] > 0 and row["ratio"] > 0 for row in rows)
    assert "not timed" in bench.line(forward) and "not" not in bench.line(rows[0])
