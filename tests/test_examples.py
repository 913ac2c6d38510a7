"""The notebooks in examples/ run from their first cell to their last; most are stored with what
they show, so that it can be seen without running them."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# What makes a notebook short; a notebook reads those it knows.
SHORT = {
    "NEMOTRON_RUN": "absent",
    "NEMOTRON_STEPS": "3",
    "NEMOTRON_NEW_TOKENS": "8",
}
EXPECTED = {
    "generate": ("nats per token in 3 steps", "tokens/s", "fullest expert"),
    "speculative": ("same tokens: True", "tokens a verification", "times plain"),
    "grpo": ("held-out success", "advantage", "tokens written by the model"),
    "serve": (
        "streamed the same: True",
        "weather {'city'",
        'stop {"product"',
        "nats a token of the prompt",
        "exit status 0",
    ),
    "evaluate": ("checkpoints after", "bits_per_byte: ", "untrained", "perplexity, bits_per_byte"),
    "nvfp4": ("4.50 bits a number", "louder by", "after 3 steps: float32", "as codes"),
    "finetune": ("180 conversations", "in 3 steps", "31 blue? ->", "adapter/adapter_model"),
}


WITH_RESULTS = ("evaluate", "finetune", "generate", "grpo", "nvfp4", "serve", "speculative")


@pytest.mark.more  # half a minute each, which notebooks cannot rot without
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    for expected in EXPECTED[path.stem]:
        assert expected in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_should_be_and_names_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert bool(outputs) == (path.stem in WITH_RESULTS)
    assert not any(output.output_type == "error" for output in outputs)
    text = path.read_text("utf-8")
    assert not any(folder in text for folder in ("/home/", "/tmp/", str(ROOT)))


def test_every_notebook_is_known() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)
