"""What the README shows, runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden_cases import GOLDEN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_every_target(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_notebook_lines_run(tmp_path):
    (code,) = blocks("python")
    code = code.replace("CHECKPOINT", str(GOLDEN / "hybrid_moe_latent" / "checkpoint"))
    names = {}
    exec(code.replace("EXPORT", str(tmp_path / "export")), names)
    assert names["result"].tokens.shape == (1, 8)
    assert (tmp_path / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_commands_run(tmp_path):
    for command in (c for c in COMMANDS if c.startswith("python")):
        words = shlex.split(re.sub(r"(runs/\w+|build/report)", rf"{tmp_path}/\1", command))
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "build" / "report" / "report.json").is_file()
