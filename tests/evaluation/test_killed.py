"""eval.py, killed in each of its suites and started again, ends as one that never was."""

import json
import signal
import subprocess
import sys

import pytest

from tests.evaluation.test_eval import ROOT, stripped

# Of each sort one: text alone, the generator's, and one whose models are made.
SUITES = {
    "longnll": "length=64:rows=2:buckets=4",
    "environments": "tasks=2:max_tokens=1400:max_turn_tokens=8",
    "quantization": "formats=(bfloat16,):tokens=256:answers=2:new_tokens=16",
}


@pytest.mark.slow  # eval.py is started five times: half a minute of CPU
def test_killed_in_every_suite_and_started_again_it_goes_on(run_directory, tmp_path) -> None:
    text = ",".join(f"{name}:{options}" for name, options in SUITES.items())
    command = [sys.executable, "eval.py", f"--checkpoint={run_directory}", f"--suites={text}"]

    def start(output):
        whole = [*command, f"--output={tmp_path / output}"]
        return subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    for number, name in enumerate(SUITES):
        process, kept = start("killed"), 0
        for line in process.stdout:
            kept += " as kept in " in line
            if line.startswith(f"{name}: running"):
                process.send_signal(signal.SIGKILL)
        # The suite before was killed the last time: it is measured now, and not kept before.
        assert process.wait() == -signal.SIGKILL and kept == max(number - 1, 0)
        assert not (tmp_path / "killed" / "report.json").exists()
    for output in ("killed", "whole"):
        process = start(output)
        said = process.stdout.read()
        assert process.wait() == 0, said
    reports = [json.loads((tmp_path / o / "report.json").read_text()) for o in ("killed", "whole")]
    assert all(one["status"] == "ok" for one in reports[0]["suites"].values())
    assert json.dumps(stripped(reports[0])) == json.dumps(stripped(reports[1]))
    transcripts = {(tmp_path / o / "transcripts.jsonl").read_bytes() for o in ("killed", "whole")}
    assert len(transcripts) == 1
