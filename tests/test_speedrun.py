"""The run through every stage goes on where it was, and its page has a row for each."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import speedrun

ROOT = Path(__file__).parents[1]
ANSWERED = {"asked": "3+4?", "answered": "seven"}


def test_a_stage_that_is_done_is_not_run_again_and_the_page_has_a_row_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def stands_in(stage: speedrun.Stage) -> speedrun.Stage:
        def run(output: Path, quick: bool) -> dict:
            ran.append(stage.name)
            if stage.name == "serve" and ran.count("serve") == 1:
                raise ValueError("no port")
            return {"loss": 0.5, "said": "<b>"} | (ANSWERED if stage.name == "serve" else {})

        return dataclasses.replace(stage, run=run)

    monkeypatch.setattr(speedrun, "STAGES", tuple(map(stands_in, speedrun.STAGES)))
    monkeypatch.setattr(sys, "argv", ["speedrun", f"--output={tmp_path}"])
    assert speedrun.main() == 1 and not (tmp_path / "report.html").exists()
    assert speedrun.main() == 0
    names = [stage.name for stage in speedrun.STAGES]
    assert str(tmp_path) not in (tmp_path / "report.html").read_text("utf-8")
    assert ran == [*names, "serve"]
    text = (tmp_path / "report.html").read_text("utf-8")
    assert all(f"<td>{name}</td>" in text for name in names)
    assert "last batch 0.5; said &lt;b&gt;" in text and "<b>" not in text
    assert "3+4?\nseven" in text


@pytest.mark.slow  # six stages of a few steps, most of it compiling
def test_a_few_steps_of_every_stage_reach_a_served_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.speedrun", "--quick", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    served = json.loads((tmp_path / "stages" / "serve.json").read_text())
    assert served["figures"]["asked"].startswith("What is ")
    assert "A few steps of each stage" in (tmp_path / "report.html").read_text("utf-8")
