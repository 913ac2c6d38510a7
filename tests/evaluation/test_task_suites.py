"""The suites of tasks from the door: one generator, reports, and scores found again."""

import json

import pytest

from nemotron_jax import evaluate as evaluation
from nemotron_jax.evaluation.rescore import rescore

SUITES = (
    "lm_eval:limit=1:length=128,"
    "ruler:lengths=(2048,):kinds=(niah_multikey_2,vt):samples=2:depths=2,"
    "tools:tasks=4:k=2:new_tokens=4"
)


@pytest.mark.more
def test_they_run_on_a_checkpoint_and_are_scored_again(run_directory, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    done = evaluation.evaluate(run_directory, SUITES, tmp_path / "report")
    found = json.loads(done.report.read_text("utf-8"))["suites"]
    assert done.status == 0 and {one["status"] for one in found.values()} == {"ok"}
    assert found["ruler"]["values"]["score"]["n"] == 4
    assert found["tools"]["values"]["pass@1"]["n"] == 4
    assert found["lm_eval"]["values"]["local_next"]["untrained"] is not None
    assert found["tools"]["counts"]["truncated"] == 8  # four tokens are no answer
    file = done.report.with_name("transcripts.jsonl")
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [sum(line["suite"] == name for line in lines) for name in found] == [5, 4, 8]
    for line in lines:
        if line["suite"] == "ruler":
            line["answer"] = ", ".join(line["gold"])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = json.loads(rescore(done.report.parent).read_text("utf-8"))["suites"]
    assert again["ruler"]["values"]["score"]["mean"] == 100
    for name in ("tools", "lm_eval"):
        means = {key: value["mean"] for key, value in found[name]["values"].items()}
        assert {key: value["mean"] for key, value in again[name]["values"].items()} == means
