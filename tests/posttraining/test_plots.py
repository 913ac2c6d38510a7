"""The picture of a run and the numbers beside it, for runs with and without every curve."""

import json

from nemotron_jax.posttraining.plots import draw_result
from nemotron_jax.run_directory import RunDirectory

PART = {"before": 0.2, "after": 0.6, "n": 8, "interval": [0.1, 0.7]}


def test_a_result_is_drawn_with_its_numbers_beside_it(tmp_path) -> None:
    result = PART | {"environments": {"lookup": PART, "arithmetic": PART}}
    records = [
        {"step": 1, "reward": 0.25, "surprise": 1.5},
        {"step": 2, "reward": 0.5, "surprise": 1.0, "success": 0.4, "success/lookup": 0.3},
    ]
    path = draw_result(result, records, RunDirectory(tmp_path))
    assert path.read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "plots/result.json").read_text())
    assert data["result"] == result
    assert data["success"] == {"arithmetic": [], "lookup": [[2, 0.3]], "all": [[2, 0.4]]}
    assert data["health"]["mean reward"] == [[1, 0.25], [2, 0.5]]
    assert draw_result(
        PART | {"environments": {}}, [], RunDirectory(tmp_path)
    ).exists()  # as without rewards
